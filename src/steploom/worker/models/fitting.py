"""What is done to a loaded pipeline before it serves: where its weights go, how it attends, how its VAE decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from steploom.config import EngineConfig
from steploom.config.parallel import asked
from steploom.errors import ConfigError
from steploom.weave import signatures, untyped
from steploom.weave.order import is_denoiser
from steploom.worker.models import attention, compile_cache, compiling
from steploom.worker.ranks import parallel
from steploom.worker.ranks.spmd import required


def fit(pipeline: Any, config: EngineConfig, device: torch.device, progress: Callable[[str], None]) -> None:
    """Applies the settings that change a pipeline; the engine's own, so it may be changed.

    Raises:
        ConfigError: The pipeline cannot do what a setting asks for.
    """
    name = type(pipeline).__name__
    if config.vae_tiling or config.vae_slicing:
        _ease_vae(pipeline, config)
    if config.attention_backend is not None:
        attention.choose(denoisers(pipeline), config.attention_backend, device, name, progress)
    if config.ranks > 1:
        parallel.refuse(config, device, denoisers(pipeline), name)
    if config.group_offload is not None:
        progress(f"keeping the weights of {name} off {device}, in groups")
        _offload(pipeline, config.group_offload, device)
    else:
        progress(f"moving {name} to {device}")
        pipeline.to(device)
    if config.ranks > 1:
        progress(f"sharing {name} with the other ranks")
        parallel.share(config, required(asked(config)), device, denoisers(pipeline))
    if config.compile:
        folder = compile_cache.prepare(config.compile_cache_bytes)
        if folder is not None:
            progress(f"compiled code is kept in {folder}")
        compiling.apply(denoisers(pipeline), config, progress)


def denoisers(pipeline: Any) -> dict[str, Any]:
    """The modules that evaluate steps, by name, without their compiled wrappers."""
    return {
        name: getattr(module, "_orig_mod", module)
        for name, module in untyped.modules_of(pipeline).items()
        if is_denoiser(name)
    }


def stays_on_device(module: Any) -> bool:
    """Whether a module's weights were quantized with bitsandbytes, which cannot be moved."""
    method = getattr(module, "quantization_method", None)  # an enum of diffusers' or transformers'
    return "bitsandbytes" in str(getattr(method, "value", method))


def _ease_vae(pipeline: Any, config: EngineConfig) -> None:
    """Tiling and slicing of whatever decodes."""
    for setting, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if not getattr(config, setting):
            continue
        able = [module for module in untyped.modules_of(pipeline).values() if callable(getattr(module, method, None))]
        if not able:
            raise ConfigError(f"{setting}=True: {type(pipeline).__name__} has no VAE that can; leave it False")
        for module in able:
            try:
                getattr(module, method)()
            except NotImplementedError as error:
                raise ConfigError(f"{setting}=True: {type(module).__name__} cannot ({error}); leave it False") from None


def _offload(pipeline: Any, given: str | Mapping[str, Any], device: torch.device) -> None:
    """Group offloading, with diffusers' own arguments."""
    arguments: dict[str, Any] = {"offload_type": given} if isinstance(given, str) else dict(given)
    known = signatures.parameters_of(pipeline.enable_group_offload)
    for name in arguments:
        if name not in known:
            raise ConfigError(f"group_offload={given!r}: {name!r} is none of {', '.join(known)}")
    _refuse_excluded(pipeline, given, arguments.get("exclude_modules"))
    for name in ("onload_device", "offload_device"):
        if name in arguments:
            arguments[name] = torch.device(arguments[name])
    onload = arguments.setdefault("onload_device", device)
    if (onload.type, onload.index or 0) != (device.type, device.index or 0):
        raise ConfigError(f"group_offload={given!r}: onload_device is not device={str(device)!r}; leave it out")
    if arguments.setdefault("offload_type", "block_level") == "block_level":
        arguments.setdefault("num_blocks_per_group", 1)
    if arguments.get("use_stream") and device.type != "cuda":
        raise ConfigError(f"group_offload={given!r}: use_stream needs a CUDA device, not {device}; leave it out")
    for name, module in untyped.modules_of(pipeline).items():
        if stays_on_device(module):
            raise ConfigError(
                f"group_offload={given!r}: {name} is quantized with bitsandbytes, whose weights stay on their device; "
                "leave out group_offload, or quantize with torchao"
            )
    try:
        pipeline.enable_group_offload(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"group_offload={given!r}: {' '.join(str(error).split())}") from None


def _refuse_excluded(pipeline: Any, given: Any, excluded: Any) -> None:
    """Refuses to leave out what is not there, of which diffusers only logs that it is not."""
    there = untyped.modules_of(pipeline)
    names = [excluded] if isinstance(excluded, str) else excluded or ()
    unknown = [name for name in names if name not in untyped.components_of(pipeline)]
    if unknown:
        raise ConfigError(
            f"group_offload={given!r}: exclude_modules names {unknown[0]!r}, and {type(pipeline).__name__} has "
            f"{', '.join(there)}"
        )
