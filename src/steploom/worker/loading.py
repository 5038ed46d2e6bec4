"""Loading a pipeline for an engine, and refusing what cannot be woven, with the mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steploom import demo
from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.protocol import Parameter, PipelineInfo
from steploom.weave import adapters, untyped

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(config: EngineConfig, progress: Callable[[str], None]) -> Any:
    """The pipeline that ``config`` names, on its device and in its dtype.

    Raises:
        ConfigError: The device, task or model does not exist.
    """
    device = resolve_device(config.device)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    folder = str(demo.path()) if config.model == "demo" else config.model
    if config.model != "demo" and not Path(folder).exists() and folder.count("/") != 1:
        raise ConfigError(f"model={config.model!r}: neither 'demo', nor a folder, nor a hub id like 'owner/name'")
    if config.task is not None and config.task not in untyped.TASKS:
        raise ConfigError(f"task={config.task!r}: one of {', '.join(untyped.TASKS)}")
    progress(f"loading {config.model} as {name}")
    pipeline = untyped.load_pipeline(folder, config.task, _DTYPES[name])
    progress(f"moving {type(pipeline).__name__} to {device}")
    pipeline.to(device)
    if config.attention_backend is not None:
        _denoiser(pipeline).set_attention_backend(config.attention_backend)
    if config.compile:
        progress(f"compiling {type(_denoiser(pipeline)).__name__} at its first calls")
        _denoiser(pipeline).compile(dynamic=True)
    return pipeline


def refuse_settings(config: EngineConfig, *, given: bool) -> None:
    """Refuses settings that this version does not honour.

    Args:
        config: The engine's settings.
        given: Whether the pipeline was given by the application, not loaded here.

    Raises:
        ConfigError: A setting would otherwise be silently without effect.
    """
    if config.cuda_graphs or config.batch_invariant:
        name = "cuda_graphs" if config.cuda_graphs else "batch_invariant"
        raise ConfigError(f"{name}=True: this version does not have it yet; leave it False")
    if given and (config.compile or config.attention_backend is not None):
        name = "compile" if config.compile else "attention_backend"
        raise ConfigError(
            f"{name}={getattr(config, name)!r}: a pipeline that was given to from_pipeline is never modified; set it "
            "on the pipeline yourself (pipe.transformer.compile(), .set_attention_backend(...))"
        )


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means here; ``"auto"`` takes CUDA if there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: {error}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices; try 'cpu' or 'auto'")
    return device


def refuse(pipeline: Any) -> None:
    """Refuses pipelines that cannot be woven.

    Raises:
        ConfigError: Model or sequential offloading, a device map, or a stateful cache is in force.
    """
    name = type(pipeline).__name__
    for component, module in untyped.modules_of(pipeline).items():
        origin = getattr(module, "_orig_mod", module)
        if hasattr(origin, "_hf_hook") or any(hasattr(child, "_hf_hook") for child in origin.modules()):
            raise ConfigError(
                f"{name}.{component} is offloaded by accelerate (enable_model_cpu_offload or "
                "enable_sequential_cpu_offload), which moves a module on every call and cannot be shared between "
                "requests; call pipe.remove_all_hooks() and use pipe.enable_group_offload(...) instead"
            )
        if getattr(origin, "is_cache_enabled", False):
            raise ConfigError(
                f"{name}.{component} has a stateful cache (enable_cache), whose state would mix requests; call "
                f"pipe.{component}.disable_cache()"
            )


def is_group_offloaded(module: Any) -> bool:
    """Whether a module's weights come and go by diffusers' group offloading."""
    origin = getattr(module, "_orig_mod", module)
    return any("group_offloading" in getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
               for child in origin.modules())  # fmt: skip


def describe(pipeline: Any, *, in_process: bool) -> PipelineInfo:
    """What the engine needs to know about a loaded pipeline."""
    parameters = untyped.call_parameters(pipeline)
    steps = parameters.get("num_inference_steps")
    denoiser = _denoiser(pipeline)
    size = getattr(pipeline, "default_sample_size", None)
    side = None if not isinstance(size, int) else size * getattr(pipeline, "vae_scale_factor", 1)
    return PipelineInfo(
        pipeline_class=type(pipeline).__name__,
        parameters=[Parameter(n, p.default is p.empty) for n, p in parameters.items()],
        default_steps=steps.default if steps is not None and isinstance(steps.default, int) else None,
        default_size=None if side is None or "height" not in parameters else (side, side),
        modules=list(untyped.modules_of(pipeline)),
        device=str(getattr(denoiser, "device", "cpu")),
        dtype=str(getattr(denoiser, "dtype", torch.float32)).removeprefix("torch."),
        in_process=in_process,
        loras=adapters.own_names(untyped.modules_of(pipeline)),
        no_lora=adapters.refusal(pipeline),
    )


def _denoiser(pipeline: Any) -> Any:
    for name in ("transformer", "unet", "prior", "transformer_2", "model"):
        module = getattr(pipeline, name, None)
        if module is not None:
            return getattr(module, "_orig_mod", module)
    return next(iter(untyped.modules_of(pipeline).values()), pipeline)
