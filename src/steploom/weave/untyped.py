# pyright: basic
"""The one place that touches what diffusers and transformers leave untyped.

Everything here takes and returns ``Any`` on purpose; the rest of the package is checked strictly.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin  # pyright: ignore[reportPrivateImportUsage] - lazily exported
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from tqdm.auto import tqdm

TASKS = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}

GaussianRows: type = DiagonalGaussianDistribution
"""What VAEs encode to: its ``parameters`` have rows."""


def load_pipeline(folder: str, task: str | None, dtype: Any) -> Any:
    """The pipeline in a folder, or of a hub id, for a task of :data:`TASKS` (None: the class that it was saved as)."""
    # The auto classes import every pipeline there is, which takes seconds: only when one is asked for.
    loader: Any = DiffusionPipeline if task is None else getattr(diffusers, TASKS[task])
    return loader.from_pretrained(folder, dtype=dtype, **_language_parts(folder, dtype))


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
    return isinstance(value, DiffusionPipeline)


def is_noise_scheduler(value: Any) -> bool:
    """Whether ``value`` is a diffusers noise scheduler (some do not derive from the mixin)."""
    return isinstance(value, SchedulerMixin) or (
        callable(getattr(value, "step", None)) and callable(getattr(value, "set_timesteps", None))
    )


def is_guider(value: Any) -> bool:
    """Whether ``value`` is a diffusers guider, which keeps state between the steps of one request."""
    return any(base.__name__ == "BaseGuidance" for base in type(value).__mro__)


def takes(function: Any, argument: str) -> bool:
    """Whether ``function`` has a parameter of that name."""
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def is_tokenizer(value: Any) -> bool:
    """Whether ``value`` is a tokenizer or a processor that holds one."""
    return any(base.__name__ in ("PreTrainedTokenizerBase", "ProcessorMixin") for base in type(value).__mro__)


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The top-level modules of a pipeline and its nested pipelines by name; a shared one once, under its first name."""
    found: dict[str, nn.Module] = {}
    for name, value in vars(pipeline).items():
        if isinstance(value, nn.Module) and not any(value is other for other in found.values()):
            found[name] = value
    for name, value in vars(pipeline).items():
        if is_pipeline(value):
            for inner, module in modules_of(value).items():
                if not any(module is other for other in found.values()):
                    found[inner if inner not in found else f"{name}.{inner}"] = module
    return found


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's ``__call__`` by name, without ``self``."""
    parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
    parameters.pop("self", None)
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def defaults(pipeline: Any) -> dict[str, Any]:
    """Defaults of the parameters of the pipeline's ``__call__`` by name."""
    return {n: p.default for n, p in call_parameters(pipeline).items() if p.default is not p.empty}


TEXT_TYPES = ("text", "seq")
"""What ``output_type`` means to language models."""


def output_type(pipeline: Any, wanted: str) -> str:
    """The ``output_type`` to call a pipeline with; to a language model, which has no pictures, ``"pil"`` is its own."""
    parameter = call_parameters(pipeline).get("output_type")
    default = None if parameter is None else parameter.default
    return default if wanted == "pil" and default in TEXT_TYPES else wanted


def silent_progress(iterable: Any, total: int | None) -> Any:
    """A progress bar that prints nothing and has all of tqdm's methods."""
    return tqdm(iterable, total=total, disable=True)


def noise_scheduler_class(name: str) -> type | None:
    """A noise scheduler class of diffusers by name."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, SchedulerMixin) else None
