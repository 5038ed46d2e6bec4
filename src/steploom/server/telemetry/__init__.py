"""What a server tells about itself: metrics, spans, and one log line for each request."""

from __future__ import annotations

from importlib.util import find_spec
from typing import cast

from prometheus_client import (
    CollectorRegistry,
    ProcessCollector,
    make_asgi_app,  # pyright: ignore[reportUnknownVariableType] - half typed
)
from starlette.types import ASGIApp

from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.engine.observer import EngineObserver
from steploom.server.telemetry.http import HttpMetrics
from steploom.server.telemetry.requests import RequestLog
from steploom.telemetry import TracingObserver
from steploom.telemetry.metrics import EngineMetrics


class Telemetry:
    """What one application tells about its engine, while its ``observers`` are among the engine's.

    Spans are made where OpenTelemetry is installed and nobody else makes them; without an SDK they cost nothing.

    Args:
        engine: Who makes everything.
        scrape_timeout_s: Seconds that ``/metrics`` waits for workers that are in a tick.

    Attributes:
        http: Of the HTTP requests.
        observers: What has to be told what the engine does.
        traced: Whether ``traceparent`` is taken over.
    """

    def __init__(self, engine: AsyncDiffusionEngine, scrape_timeout_s: float) -> None:
        self._scrape_timeout_s = scrape_timeout_s
        registry = CollectorRegistry(auto_describe=True)  # not the process's own: it may have several applications
        ProcessCollector(registry=registry)
        self._metrics = EngineMetrics(engine, registry)
        self.http = HttpMetrics(registry)
        self._registry = registry
        self.observers: list[EngineObserver] = [self._metrics, RequestLog()]
        self.traced = find_spec("opentelemetry") is not None
        if self.traced and not any(isinstance(observer, TracingObserver) for observer in engine.observers):
            self.observers.append(TracingObserver())

    async def exposition(self) -> ASGIApp:
        """The metrics as of now, as an application that answers in the format that a client prefers."""
        await self._metrics.refresh(self._scrape_timeout_s)
        return cast("ASGIApp", make_asgi_app(self._registry))
