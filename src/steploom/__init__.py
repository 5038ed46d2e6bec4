"""steploom: any diffusers pipeline, continuously batched, from asyncio.

Importing this package loads neither torch nor diffusers: names are resolved when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steploom.config import EngineConfig as EngineConfig
    from steploom.engine.async_engine import AsyncDiffusionEngine as AsyncDiffusionEngine
    from steploom.engine.async_engine import RequestStream as RequestStream
    from steploom.engine.observer import EngineObserver as EngineObserver
    from steploom.engine.sync import DiffusionEngine as DiffusionEngine
    from steploom.errors import ConfigError as ConfigError
    from steploom.errors import DeadlineExceeded as DeadlineExceeded
    from steploom.errors import EngineDead as EngineDead
    from steploom.errors import EngineError as EngineError
    from steploom.errors import EngineNotRunning as EngineNotRunning
    from steploom.errors import GenerationFailed as GenerationFailed
    from steploom.errors import InvalidRequest as InvalidRequest
    from steploom.errors import ProtocolError as ProtocolError
    from steploom.errors import QueueFull as QueueFull
    from steploom.errors import RequestCancelled as RequestCancelled
    from steploom.errors import RequestError as RequestError
    from steploom.errors import SteploomError as SteploomError
    from steploom.errors import TickTimeout as TickTimeout
    from steploom.errors import WorkerDied as WorkerDied
    from steploom.requests import Commit as Commit
    from steploom.requests import DiffusionOutput as DiffusionOutput
    from steploom.requests import DiffusionRequest as DiffusionRequest
    from steploom.requests import Draft as Draft
    from steploom.requests import Finished as Finished
    from steploom.requests import Queued as Queued
    from steploom.requests import Restarted as Restarted
    from steploom.requests import StepEvent as StepEvent
    from steploom.requests import Timings as Timings

__version__ = "0.1.0"

_HOMES = {
    "steploom.config": ("EngineConfig",),
    "steploom.engine.async_engine": ("AsyncDiffusionEngine", "RequestStream"),
    "steploom.engine.observer": ("EngineObserver",),
    "steploom.engine.sync": ("DiffusionEngine",),
    "steploom.errors": (
        "SteploomError", "ConfigError", "RequestError", "InvalidRequest", "QueueFull", "RequestCancelled",
        "GenerationFailed", "DeadlineExceeded", "EngineError", "EngineNotRunning", "EngineDead", "WorkerDied",
        "TickTimeout", "ProtocolError",
    ),
    "steploom.requests": (
        "DiffusionRequest", "DiffusionOutput", "Timings", "Queued", "StepEvent", "Draft", "Commit", "Restarted",
        "Finished",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [  # a literal, for type checkers; a test holds it against the table above
    "AsyncDiffusionEngine",
    "Commit",
    "ConfigError",
    "DeadlineExceeded",
    "DiffusionEngine",
    "DiffusionOutput",
    "DiffusionRequest",
    "Draft",
    "EngineConfig",
    "EngineDead",
    "EngineError",
    "EngineNotRunning",
    "EngineObserver",
    "Finished",
    "GenerationFailed",
    "InvalidRequest",
    "ProtocolError",
    "QueueFull",
    "Queued",
    "RequestCancelled",
    "RequestError",
    "RequestStream",
    "Restarted",
    "StepEvent",
    "SteploomError",
    "TickTimeout",
    "Timings",
    "WorkerDied",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'steploom' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
