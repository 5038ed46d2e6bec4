"""Observed: each HTTP request is counted, has an id, continues its client's trace, and ends in one line of the log."""

from __future__ import annotations

import contextlib
import http
import logging
import re
import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steploom.server.places import place
from steploom.server.telemetry.record import RECORD, Record
from steploom.telemetry.tallies import SECONDS, Tally

if TYPE_CHECKING:
    from steploom.server.telemetry import Telemetry

lines = logging.getLogger("steploom.access")

_GONE = 499
_METHODS = {str(method) for method in http.HTTPMethod}
_PROBES = {"/live", "/ready", "/health", "/metrics"}
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class HttpMetrics(Collector):
    """HTTP requests by method, route as it is declared, and status.

    Args:
        registry: Where it is registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[str, Tally] = {}
        registry.register(self)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One more."""
        key = (method if method in _METHODS else "OTHER", route, str(status))
        self._requests[key] = self._requests.get(key, 0) + 1
        self._seconds.setdefault(route, Tally(SECONDS)).add(seconds)

    def collect(self) -> Iterator[Metric]:
        """Every metric, as Prometheus' client wants it."""
        about = "HTTP requests; status 499 is a client that hung up before its response began"
        requests = CounterMetricFamily("steploom_http_requests", about, labels=("method", "route", "status"))
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        about = "Seconds from an HTTP request to the end of its response"
        seconds = HistogramMetricFamily("steploom_http_request_seconds", about, labels=("route",))
        for route, tally in self._seconds.items():
            seconds.add_metric((route,), tally.buckets, tally.total)
        yield seconds


class Observed:
    """Watches each HTTP request from outside. Bare ASGI.

    Args:
        app: What is behind it.
        telemetry: Who is told.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(headers.get("x-request-id"))
        scope, route = place(scope)
        scope["steploom.request_id"] = record.request_id
        began, token = time.monotonic(), RECORD.set(record)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            with _traced(record, headers, taken_over=self._telemetry.traced):
                await self._app(scope, receive, watched)
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            self._tell(scope["method"], route, record, time.monotonic() - began)
            RECORD.reset(token)

    def _tell(self, method: str, route: str, record: Record, seconds: float) -> None:
        """Counts the request, and writes its line."""
        record.ended = True
        status = record.status or _GONE
        self._telemetry.http.count(method, route, status, seconds)
        expected = (200, 503) if route in _PROBES else ()  # asked every few seconds, also while the model is loaded
        failed = status >= 500 or record.outcome == "failed"
        level = logging.DEBUG if status in expected else logging.WARNING if failed else logging.INFO
        fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), **record.fields()}
        ids = {"request_id": record.request_id, "trace_id": record.trace_id}
        lines.log(level, "%s %s %d", method, route, status, extra={**fields, **ids})


@contextlib.contextmanager
def _traced(record: Record, headers: Mapping[str, str], *, taken_over: bool) -> Generator[None]:
    """Requests that are submitted within continue the client's trace, unless the application has begun its own."""
    given = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    record.trace_id = given[1] if given else None
    if not taken_over:
        yield
        return
    from opentelemetry import context, propagate, trace

    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        record.trace_id = trace.format_trace_id(current.trace_id)
        yield
        return
    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)
