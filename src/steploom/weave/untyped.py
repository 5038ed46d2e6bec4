# pyright: basic
"""The one place that touches what diffusers and transformers leave untyped.

Everything here takes and returns ``Any`` on purpose; the rest of the package is checked strictly.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin  # pyright: ignore[reportPrivateImportUsage] - lazily exported
from torch import nn
from tqdm.auto import tqdm

TASKS = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}


def load_pipeline(folder: str, task: str | None, dtype: Any) -> Any:
    """The pipeline in a folder, or of a hub id, for a task of :data:`TASKS` (None: the class that it was saved as)."""
    # The auto classes import every pipeline there is, which takes seconds: only when one is asked for.
    loader: Any = DiffusionPipeline if task is None else getattr(diffusers, TASKS[task])
    return loader.from_pretrained(folder, dtype=dtype)


def is_pipeline(value: Any) -> bool:
    """Whether ``value`` is a diffusers pipeline."""
    return isinstance(value, DiffusionPipeline)


def is_noise_scheduler(value: Any) -> bool:
    """Whether ``value`` is a diffusers noise scheduler (some do not derive from the mixin)."""
    return isinstance(value, SchedulerMixin) or (
        callable(getattr(value, "step", None)) and callable(getattr(value, "set_timesteps", None))
    )


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


def silent_progress(iterable: Any, total: int | None) -> Any:
    """A progress bar that prints nothing and has all of tqdm's methods."""
    return tqdm(iterable, total=total, disable=True)


def noise_scheduler_class(name: str) -> type | None:
    """A noise scheduler class of diffusers by name."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, SchedulerMixin) else None
