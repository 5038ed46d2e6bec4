"""Observers for any engine, served or embedded: Prometheus metrics, OpenTelemetry spans, a Chrome trace of ticks.

::

    engine.observers.append(TracingObserver())

What an observer needs is imported when it is asked for: ``EngineMetrics`` needs the extra ``server``,
``TracingObserver`` the extra ``otel``, ``ProfileObserver`` nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steploom.telemetry.metrics import EngineMetrics as EngineMetrics
    from steploom.telemetry.profile import ProfileObserver as ProfileObserver
    from steploom.telemetry.traces import TracingObserver as TracingObserver

__all__ = ["EngineMetrics", "ProfileObserver", "TracingObserver"]

_HOME_OF = {"EngineMetrics": "metrics", "ProfileObserver": "profile", "TracingObserver": "traces"}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'steploom.telemetry' has no attribute {name!r}")
    return getattr(importlib.import_module(f"steploom.telemetry.{home}"), name)


def __dir__() -> list[str]:
    return __all__
