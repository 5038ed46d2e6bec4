"""Executors: how ticks get from the engine to the devices and back."""

from __future__ import annotations

import importlib
import inspect

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.executor.attached import AttachedExecutor
from steploom.executor.multiproc import MultiprocExecutor
from steploom.executor.ray import RayExecutor
from steploom.executor.uniproc import InprocExecutor

__all__ = [
    "AttachedExecutor",
    "DiffusionExecutor",
    "InprocExecutor",
    "MultiprocExecutor",
    "ProgressCallback",
    "RayExecutor",
    "resolve_executor",
]

_BUILT_IN: dict[str, type[DiffusionExecutor]] = {
    "inproc": InprocExecutor,
    "mp": MultiprocExecutor,
    "ray": RayExecutor,
}
_MEND = (
    "give 'mp', 'inproc', 'ray', a subclass of steploom.executor.DiffusionExecutor, or its name as 'pkg.module.Class'"
)


def resolve_executor(config: EngineConfig) -> type[DiffusionExecutor]:
    """The class that ``config.distributed_executor_backend`` means.

    Raises:
        ConfigError: It means none.
    """
    backend = config.distributed_executor_backend
    found = _BUILT_IN.get(backend) or _named(backend) if isinstance(backend, str) else backend
    if not (isinstance(found, type) and issubclass(found, DiffusionExecutor)):
        raise ConfigError(f"distributed_executor_backend={backend!r}: is no DiffusionExecutor; {_MEND}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"distributed_executor_backend={backend!r}: does not implement {missing}")
    return found


def _named(backend: str) -> object:
    module, _, name = backend.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"distributed_executor_backend={backend!r}: does not import ({error}); {_MEND}") from None
