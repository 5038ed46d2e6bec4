# pyright: basic
"""The one place that touches what diffusers and transformers leave untyped.

Everything here takes and returns ``Any`` on purpose; the rest of the package is checked strictly.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Iterator, Mapping
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
    return loader.from_pretrained(folder, dtype=dtype)


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
    """Parameters of the ``__call__`` of a pipeline or of its class by name, without ``self``."""
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    parameters = dict(inspect.signature(cls.__call__).parameters)
    parameters.pop("self", None)
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def silent_progress(iterable: Any, total: int | None) -> Any:
    """A progress bar that prints nothing and has all of tqdm's methods."""
    return tqdm(iterable, total=total, disable=True)


def noise_scheduler_class(name: str) -> type | None:
    """A noise scheduler class of diffusers by name."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, SchedulerMixin) else None


def pipeline_class(name: str) -> type | None:
    """A pipeline class of diffusers by name. Imports that class alone, not the auto classes with all there are."""
    try:
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError):  # it needs a package that is not there
        return None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


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
    takes, _ = cls._get_signature_keys(cls)
    own = {name: value for name, value in components.items() if name in takes}
    still: Any = type(cls.__name__, (cls,), {"to": lambda self, *_, **__: self, "__module__": cls.__module__})
    with quietly():
        made = still.from_pipe(pipeline, **own)
    made.__class__ = cls
    return made


def load_component(folder: str, dtype: Any) -> Any:
    """The model in a folder, or of a hub id, in the class that its configuration names."""
    loader: Any = diffusers.AutoModel  # pyright: ignore[reportPrivateImportUsage] - lazily exported
    return loader.from_pretrained(folder, dtype=dtype)


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
