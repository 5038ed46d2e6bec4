# pyright: basic
"""The one place that touches what diffusers and transformers leave untyped.

Everything here takes and returns ``Any`` on purpose; the rest of the package is checked strictly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin  # pyright: ignore[reportPrivateImportUsage] - lazily exported
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput, DummyObject  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from tqdm.auto import tqdm

from steploom.weave.kinds import derives, is_module, offers

TASKS = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}

GaussianRows: type = DiagonalGaussianDistribution
"""What VAEs encode to: its ``parameters`` have rows."""

PIPELINE: type = DiffusionPipeline
"""What all pipelines derive from."""

DOWNLOADS = (
    ("diffusers.pipelines.pipeline_utils", "snapshot_download"),
    ("diffusers.loaders.single_file", "snapshot_download"),
    ("diffusers.utils.hub_utils", "hf_hub_download"),
)
"""Where diffusers downloads weights: modules, and the name of the function that they imported."""

BARS = ("diffusers.utils.logging", "tqdm")
"""Where diffusers makes the bar of a pipeline's components."""


def load_pipeline(folder: str, task: str | None, **options: Any) -> Any:
    """The pipeline in a folder, or of a hub id, for a task of :data:`TASKS` (None: the class that it was saved as).

    Args:
        folder: Or a hub id.
        task: One of :data:`TASKS`.
        options: As ``from_pretrained`` takes them.
    """
    # The auto classes import every pipeline there is, which takes seconds: only when one is asked for.
    loader: Any = DiffusionPipeline if task is None else getattr(diffusers, TASKS[task])
    return loader.from_pretrained(folder, **{**_language_parts(folder, options.get("dtype")), **options})


def for_task(pipeline: Any, task: str | None) -> Any:
    """A pipeline of the same components for a task of :data:`TASKS`."""
    return pipeline if task is None else getattr(diffusers, TASKS[task]).from_pipe(pipeline)


def model_index(folder: str, **options: Any) -> dict[str, Any]:
    """The index of a folder in diffusers layout, or of a hub id: library and class by component, and the class."""
    index: Any = DiffusionPipeline.load_config(folder, **options)
    return dict(index)


def component_class(library: str, name: str) -> Any:
    """The class that an index names; of the libraries that diffusers imports, or one that is imported already."""
    return importlib.import_module("diffusers.pipelines.pipeline_loading_utils").simple_get_class_obj(library, name)


def quantization_configs(library: str) -> dict[str, Any]:
    """The quantization config classes of ``"diffusers"`` or ``"transformers"``, by the name of their backend."""
    known = importlib.import_module(f"{library}.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    return {**known, "bitsandbytes": known["bitsandbytes_4bit"]}


def pipeline_quantization(configs: dict[str, Any]) -> Any:
    """What ``from_pretrained`` of a pipeline takes: a config object for each component that is quantized."""
    return importlib.import_module("diffusers.quantizers").PipelineQuantizationConfig(quant_mapping=configs)


def torchao_config(value: Any) -> Any:
    """Torchao's own description of a quantization: from its class' name, or from what ``config_to_dict`` gave."""
    if isinstance(value, str):
        named = value if value.endswith("Config") else "".join(map(str.capitalize, value.split("_"))) + "Config"
        return getattr(importlib.import_module("torchao.quantization"), named)()
    if isinstance(value, dict):
        return importlib.import_module("torchao.core.config").config_from_dict(value.get("default", value))
    return value


def checkpoint(path: str, **options: Any) -> dict[str, Any]:
    """The tensors of a single file, by name; the file stays on the disk until they are used."""
    return importlib.import_module("diffusers.loaders.single_file").load_single_file_checkpoint(path, **options)


def published_with(tensors: dict[str, Any]) -> str | None:
    """The hub id that a single file's model was published under, as diffusers infers it; None if it cannot tell.

    What diffusers does not know it takes for Stable Diffusion 1: that is told apart here by what such a file holds.
    """
    single_file = importlib.import_module("diffusers.loaders.single_file")
    found = single_file.fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    known = "stable-diffusion-v1-5" not in found or "model.diffusion_model.input_blocks.0.0.weight" in tensors
    return found if known else None


def _language_parts(folder: str, dtype: Any) -> dict[str, Any]:
    """The components of a language model's folder that diffusers 0.42 saves such that it cannot load them.

    DiffusionGemma's model is noted as a class of diffusers. LLaDA 2's tokenizer counts as an argument with a default:
    it is not even saved, but taken from ``tokenizer/`` if it is there.
    """
    index = Path(folder, "model_index.json")
    parts: dict[str, Any] = json.loads(index.read_text()) if index.is_file() else {}
    if parts.get("_class_name") not in ("LLaDA2Pipeline", "DiffusionGemmaPipeline"):
        return {}
    transformers: Any = importlib.import_module("transformers")
    if parts["_class_name"] == "LLaDA2Pipeline":
        place = Path(folder, "tokenizer")
        return {"tokenizer": transformers.AutoTokenizer.from_pretrained(place) if place.is_dir() else None}
    library, name = parts["model"]
    if library == "transformers" or not hasattr(transformers, name):
        return {}
    return {"model": getattr(transformers, name).from_pretrained(Path(folder, "model"), dtype=dtype)}


def is_pipeline(value: Any) -> bool:
    """Whether ``value`` is a diffusers pipeline."""
    return issubclass(type(value), DiffusionPipeline)  # a weak proxy is none


def is_output(value: Any) -> bool:
    """Whether ``value`` is a class of what pipelines return."""
    return isinstance(value, type) and issubclass(value, BaseOutput) and value is not BaseOutput


def is_noise_scheduler(value: Any) -> bool:
    """Whether ``value`` is a diffusers noise scheduler (some do not derive from the mixin)."""
    kind = type(value)  # the object itself may answer to any name
    if issubclass(kind, SchedulerMixin) or not callable(getattr(kind, "step", None)):
        return issubclass(kind, SchedulerMixin)
    return offers(value, "set_timesteps")


def is_guider(value: Any) -> bool:
    """Whether ``value`` is a diffusers guider, which keeps state between the steps of one request."""
    return derives(value, "BaseGuidance")


def attention_backends() -> Any:
    """Diffusers' module of attention backends."""
    return importlib.import_module("diffusers.models.attention_dispatch")


def repeated_blocks(module: Any) -> list[str]:
    """The classes of blocks of which a model says that it is made: what regional compilation compiles."""
    named = getattr(module, "_repeated_blocks", None) or []
    there = {type(part).__name__ for part in module.modules()}
    return [name for name in named if name in there]


def is_tokenizer(value: Any) -> bool:
    """Whether ``value`` is a tokenizer or a processor that holds one."""
    return derives(value, "PreTrainedTokenizerBase", "ProcessorMixin")


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The top-level modules of a pipeline and its nested pipelines by name; a shared one once, under its first name."""
    found: dict[str, nn.Module] = {}
    for name, value in vars(pipeline).items():
        if is_module(value) and not any(value is other for other in found.values()):
            found[name] = value
    for name, value in vars(pipeline).items():
        if is_pipeline(value):
            for inner, module in modules_of(value).items():
                if not any(module is other for other in found.values()):
                    found[inner if inner not in found else f"{name}.{inner}"] = module
    return found


def silent_progress(iterable: Any, total: int | None) -> Any:
    """A progress bar that prints nothing and has all of tqdm's methods."""
    return tqdm(iterable, total=total, disable=True)


@functools.cache
def noise_scheduler_classes() -> dict[str, Any]:
    """The noise scheduler classes of diffusers by name; one that lacks a package has ``_backends``."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, DummyObject) or (isinstance(cls, type) and issubclass(cls, SchedulerMixin))
    }


def has_peft() -> bool:
    """Whether LoRA adapters can be used here."""
    return importlib.util.find_spec("peft") is not None


def tuner_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module tree that adapters were injected into, by path."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: part for path, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def lora_tables(layer: Any) -> tuple[str, ...]:
    """The tables of a LoRA layer that have one entry per adapter; empty for any other layer."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return ()
    names = (*LoraLayer.adapter_layer_names, *LoraLayer.other_param_names, "lora_variant")
    return tuple(name for name in names if hasattr(layer, name))


def load_lora(pipeline: Any, where: str, name: str, weight_name: str | None) -> None:
    """Injects the adapter of a file, a folder or a hub repository into the pipeline's modules as ``name``."""
    pipeline.load_lora_weights(where, adapter_name=name, **({"weight_name": weight_name} if weight_name else {}))


def takes_lora(pipeline: Any) -> bool:
    """Whether diffusers can load LoRA adapters into a pipeline of this class."""
    return hasattr(pipeline, "load_lora_weights") and hasattr(pipeline, "set_adapters")


def pipeline_class(name: str) -> Any:
    """A pipeline class of diffusers by name, None if there is none. Imports that class alone, not all there are."""
    try:
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError):  # it needs a package that is not there
        return None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def has(name: str) -> bool:
    """Whether diffusers has something of that name, if need be as a stand-in that asks for a package."""
    return name in dir(diffusers)


def component_names(cls: Any) -> list[str]:
    """The components that a pipeline class is made of."""
    return list(cls._get_signature_keys(cls)[0])


def components_of(pipeline: Any) -> dict[str, Any]:
    """The components that a pipeline was made of, by name; nothing for one that does not say."""
    try:
        return dict(pipeline.components)
    except (AttributeError, ValueError):
        return {}


def sibling(cls: Any, components: Mapping[str, Any], pipeline: Any) -> Any:
    """A pipeline of class ``cls`` over ``components``, with the settings of ``pipeline``.

    Made by diffusers' own ``from_pipe``, less what that does last: it moves all components to one dtype, in place.
    (``from_pipe`` of the auto classes does not, but those import every pipeline that there is.)

    Raises:
        ValueError: ``cls`` needs a component that is not there.
    """
    takes = component_names(cls)
    own = {name: value for name, value in components.items() if name in takes}
    still: Any = type(cls.__name__, (cls,), {"to": lambda self, *_, **__: self, "__module__": cls.__module__})
    with quietly():
        made = still.from_pipe(pipeline, **own)
    made.__class__ = cls
    return made


def load_component(folder: str, dtype: Any, **options: Any) -> Any:
    """The model in a folder, or of a hub id, in the class that its configuration names."""
    loader: Any = diffusers.AutoModel  # pyright: ignore[reportPrivateImportUsage] - lazily exported
    return loader.from_pretrained(folder, dtype=dtype, **options)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what diffusers logs on this thread to itself."""
    here = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    handlers = logging.getLogger("diffusers").handlers.copy()
    for handler in handlers:
        handler.addFilter(elsewhere)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(elsewhere)


def parallelize(module: Any, mesh: Any, rank: int, device: Any, degrees: Mapping[str, Any]) -> Any:
    """Has a model share its forwards with the same model of other ranks, by diffusers' own ways; its configuration.

    diffusers asks torch for an accelerator and counts its devices, of which a CPU has none: the mesh and this rank's
    device are given to it.

    Args:
        module: The model; its attention must be of a backend that can.
        mesh: Of ``torch.distributed``, with the dimensions ``ring`` and ``ulysses``, or ``tp``.
        rank: This one's number.
        device: Where the module is.
        degrees: ``ring_degree`` and ``ulysses_degree``, or ``tp_degree``.

    Raises:
        ValueError: The model cannot.
    """
    from diffusers.models import _modeling_parallel as ways

    if "tp_degree" in degrees:
        config = ways.ParallelConfig(tensor_parallel_config=ways.TensorParallelConfig(mesh=mesh, **degrees))
    else:
        config = ways.ParallelConfig(context_parallel_config=ways.ContextParallelConfig(mesh=mesh, **degrees))

    def resolved(_: Any) -> Any:
        config.setup(rank, mesh.size(), device, mesh=mesh)
        module._parallel_config = config
        return config

    module.__dict__["_resolve_parallel_config"] = resolved
    try:
        with quietly():  # it warns that this is experimental
            module.enable_parallelism(config=config)
    finally:
        del module.__dict__["_resolve_parallel_config"]
    return config.context_parallel_config or config.tensor_parallel_config
