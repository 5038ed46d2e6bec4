"""Loading a pipeline for an engine, and refusing what cannot be woven, with the mend."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.protocol import Parameter, PipelineInfo
from steploom.weave import signatures, untyped
from steploom.weave.lora import adapters
from steploom.weave.modules.offloading import is_offloaded
from steploom.weave.noise.choice import choices, lacking
from steploom.worker.models import attention, compiling, downloads, fitting, left_out, mends, sources
from steploom.worker.models.assembly import assemble
from steploom.worker.models.factories import no_pipeline
from steploom.worker.traits import annotations, frames, id_tables, lengths, needs, products, sizes, sounds

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_GIVEN: dict[str, str] = {
    "compile": "pipe.transformer.compile_repeated_blocks(dynamic=True)",
    "attention_backend": "pipe.transformer.set_attention_backend(...)",
    "variant": "from_pretrained(..., variant=...)",
    "revision": "from_pretrained(..., revision=...)",
    "base_model": "from_single_file(..., config=...)",
    "components": "from_pretrained(..., transformer=...)",
    "quantization_config": "from_pretrained(..., quantization_config=...)",
    "trust_remote_code": "from_pretrained(..., trust_remote_code=True)",
    "group_offload": "pipe.enable_group_offload(...)",
    "vae_tiling": "pipe.vae.enable_tiling()",
    "vae_slicing": "pipe.vae.enable_slicing()",
}
"""Settings of loading, and how an application does the same to a pipeline of its own."""


def load(config: EngineConfig, progress: Callable[[str], None]) -> Any:
    """The pipeline that ``config`` names, on its device and in its dtype.

    Raises:
        ConfigError: The device, task or model does not exist, or settings do not go together.
    """
    device = resolve_device(config.device)
    refuse_settings(config, given=False)
    source = sources.find(config.model)
    sources.refuse(config, source)
    if config.task is not None and config.task not in untyped.TASKS:
        raise ConfigError(f"task={config.task!r}: one of {', '.join(untyped.TASKS)}")
    dtype, name = _dtype(config, device)
    progress(f"loading {config.model} as {name}")
    explained = mends.own_factory if source.kind == "factory" else mends.explained
    with downloads.told(progress), explained(config):
        pipeline = assemble(config, source, dtype, progress)
    refuse_incomplete(config, pipeline)
    refuse(pipeline)
    fitting.fit(pipeline, config, device, progress)
    return pipeline


def _dtype(config: EngineConfig, device: torch.device) -> tuple[Any, str]:
    """The dtype, or dtypes by component, as torch has them, and how to call them."""
    if isinstance(config.dtype, Mapping):
        given = dict(config.dtype)
        return {name: _DTYPES[value] for name, value in given.items()}, str(given)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    return _DTYPES[name], name


def refuse_settings(config: EngineConfig, *, given: bool) -> None:
    """Refuses settings that this version does not honour.

    Args:
        config: The engine's settings.
        given: Whether the pipeline was given by the application, not loaded here.

    Raises:
        ConfigError: A setting would otherwise be silently without effect.
    """
    for name, instead in _GIVEN.items() if given else ():
        if getattr(config, name):
            raise ConfigError(
                f"{name}={getattr(config, name)!r}: a pipeline that was given to from_pipeline is never modified; set "
                f"it on the pipeline yourself: {instead}"
            )
    attention.refuse(config.attention_backend)
    if (config.compile or config.cuda_graphs) and not given:
        device = resolve_device(config.device)
        compiling.refuse(config, device)
        if config.cuda_graphs:
            refuse_graphs(device)


def refuse_graphs(device: torch.device) -> None:
    """Refuses CUDA graphs where there is no CUDA.

    Raises:
        ConfigError: The device is another.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs=True: needs a CUDA device, and this is {str(device)!r}; leave it False (compile=True is for "
            "any device)"
        )


def refuse_moves(config: EngineConfig, pipeline: Any) -> None:
    """Refuses a dtype or device that a given pipeline does not have.

    Raises:
        ConfigError: It would be without effect.
    """
    module = denoiser_of(pipeline)
    dtype = str(getattr(module, "dtype", "")).removeprefix("torch.")
    if config.dtype != "auto" and dtype and config.dtype != dtype:
        raise ConfigError(f"dtype={config.dtype!r}: the given pipeline is in {dtype}; call pipe.to(...) yourself")
    device, wanted = pipeline._execution_device, resolve_device(config.device)
    if config.device != "auto" and (device.type, device.index or 0) != (wanted.type, wanted.index or 0):
        raise ConfigError(f"device={config.device!r}: the given pipeline is on {device}; call pipe.to(...) yourself")
    if config.cuda_graphs:
        refuse_graphs(device)


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means here; ``"auto"`` takes CUDA if there is one, ``"auto:1"`` then the second one.

    Raises:
        ConfigError: There is no such device.
    """
    if name.partition(":")[0] == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = name.replace("auto", "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: {error}") from None
    if device.type == "meta":
        raise ConfigError("device='meta': holds no numbers, so nothing can be computed there; try 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices; try 'cpu' or 'auto'")
    return device


def refuse_other(given: Any) -> None:
    """Refuses what is no pipeline of diffusers, where the application gives one.

    Raises:
        ConfigError: Says what it is.
    """
    if not untyped.is_pipeline(given):
        raise ConfigError(f"from_pipeline: got {no_pipeline(given)}; give a DiffusionPipeline")


def refuse_incomplete(config: EngineConfig, pipeline: Any) -> None:
    """Refuses a model of which the files lack weights: diffusers leaves these without memory, and says nothing.

    Raises:
        ConfigError: Names the component and one of them.
    """
    for name, module in untyped.modules_of(pipeline).items():
        lacking = [path for path, one in module.named_parameters() if one.is_meta]
        if lacking:
            where = (config.components or {}).get(name)
            setting = f"model={config.model!r}" if where is None else f"components[{name!r}]={where!r}"
            raise ConfigError(
                f"{setting}: the weights of {name} lack {lacking[0]}"
                f"{f' and {len(lacking) - 1} others' if len(lacking) > 1 else ''}; give the files that were saved "
                "together with its configuration"
            )


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
    return any(map(is_offloaded, origin.modules()))


def refuse_sleep(modules: Mapping[str, Any]) -> None:
    """Refuses to move weights to host memory that are there already, or cannot be moved.

    Raises:
        ConfigError: A module is group-offloaded, or quantized with bitsandbytes.
    """
    for name, module in modules.items():
        if is_group_offloaded(module):
            raise ConfigError(f"sleep(level=1): {name} is group-offloaded, so its weights are off the device already")
        if fitting.stays_on_device(module):
            raise ConfigError(
                f"sleep(level=1): {name} is quantized with bitsandbytes, which stays on its device; use level=2"
            )


def device_name(device: str) -> str:
    """What the device is called: the GPU's name, or the processor's and how many threads torch takes of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} x{torch.get_num_threads()}"


def describe(pipeline: Any, *, in_process: bool) -> PipelineInfo:
    """What the engine needs to know about a loaded pipeline."""
    parameters = signatures.call_parameters(pipeline)
    steps, length = (_default(parameters.get(name)) for name in ("num_inference_steps", "gen_length"))
    denoiser, noise_scheduler = denoiser_of(pipeline), getattr(pipeline, "scheduler", None)
    shortened_by, shortened_up = lengths.shortened(pipeline)
    output_types = signatures.output_types(pipeline)
    return PipelineInfo(
        pipeline_class=type(pipeline).__name__,
        parameters=_parameters(pipeline),
        needs=needs.needs(pipeline),
        default_steps=steps,
        default_length=length,
        **sizes.told(pipeline, denoiser),
        output_types=output_types,
        decoder_left_out=left_out.decoder(pipeline, output_types),
        shortened_by=shortened_by,
        shortened_up=shortened_up,
        modules=list(untyped.modules_of(pipeline)),
        device=str(getattr(denoiser, "device", "cpu")),
        device_name=device_name(str(getattr(denoiser, "device", "cpu"))),
        dtype=str(getattr(denoiser, "dtype", torch.float32)).removeprefix("torch."),
        in_process=in_process,
        makes=products.makes(pipeline),
        frame_rate=products.frame_rate(pipeline),
        default_frames=products.default_frames(pipeline),
        **frames.told(pipeline, denoiser),
        ids=id_tables.told(pipeline, denoiser),
        sampling_rate=products.sampling_rate(pipeline),
        **sounds.told(pipeline, denoiser),
        loras=adapters.own_names(untyped.modules_of(pipeline)),
        no_lora=adapters.refusal(pipeline),
        noise_scheduler=None if noise_scheduler is None else type(noise_scheduler).__name__,
        noise_schedulers={} if noise_scheduler is None else choices(noise_scheduler, pipeline),
        noise_schedulers_lacking=lacking(noise_scheduler),
    )


def _parameters(pipeline: Any) -> list[Parameter]:
    """The parameters of the pipeline's ``__call__``, those that it takes out of its ``**kwargs`` last."""
    kinds = annotations.kinds(type(pipeline))
    listed = [
        Parameter(name, one.default is one.empty, kinds.get(name, ""), annotations.takes_none(pipeline, one))
        for name, one in signatures.call_parameters(pipeline).items()
    ]
    return listed + [Parameter(name, False) for name in signatures.hidden_parameters(pipeline)]


def _default(parameter: inspect.Parameter | None) -> int | None:
    """The default of a parameter that counts."""
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def denoiser_of(pipeline: Any) -> Any:
    """The module that evaluates steps, without its compiled wrapper."""
    for name in ("transformer", "unet", "prior", "transformer_2", "model"):
        module = getattr(pipeline, name, None)
        if module is not None:
            return getattr(module, "_orig_mod", module)
    return next(iter(untyped.modules_of(pipeline).values()), pipeline)
