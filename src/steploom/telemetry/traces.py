"""TracingObserver: an OpenTelemetry span for each request, with a child for each of its phases (extra ``otel``)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from steploom.errors import ConfigError, RequestError, SteploomError, unusable
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.telemetry.lives import Life, Lives
from steploom.telemetry.outcomes import kind_of, outcome_of, refusal_of

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, TracerProvider

SPAN = "steploom.request"
"""The name of a request's span; those of its children are the phases."""


class TracingObserver(Lives):
    """Makes a span of each request: parent of ``queued``, ``encode``, ``denoise`` and ``decode``.

    ::

        engine.observers.append(TracingObserver())

    The span's own parent is whatever span is current where the request is submitted. Attributes are
    ``steploom.request_id``, ``steploom.task``, ``steploom.outcome``, ``steploom.steps``,
    ``steploom.batch_requests.mean`` (how many requests shared its denoiser calls, on average), ``steploom.attempt``
    (if a worker has lost it), and ``error.type`` of what failed. Spans hold no prompt and no message
    of an error, unless asked for.

    Where spans are not recorded, as without an SDK, it costs next to nothing.

    Args:
        tracer_provider: Who makes spans; None takes OpenTelemetry's global one.
        content: Whether prompts and messages of errors become attributes too.

    Raises:
        ConfigError: The extra ``otel`` is missing.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, content: bool = False) -> None:
        super().__init__()
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise ConfigError(f"TracingObserver: {unusable(error)}; pip install 'steploom[otel]'") from None
        from steploom import __version__

        self._trace = trace
        self._tracer = trace.get_tracer("steploom", __version__, tracer_provider)
        self._content = content

    def born(self, request: DiffusionRequest, at: float) -> Life | None:
        """Begins its span, in the context of the task that submits it."""
        zero = time.time_ns() - int(at * 1e9)
        span = self._tracer.start_span(SPAN, start_time=zero + int(at * 1e9), attributes=self._asked(request))
        if not span.is_recording():
            return None
        return _Traced(request.request_id, at, span, self._trace.set_span_in_context(span), zero)

    def _asked(self, request: DiffusionRequest) -> dict[str, str]:
        asked = {"steploom.request_id": request.request_id}
        if request.task is not None:
            asked["steploom.task"] = request.task
        if self._content and request.prompt is not None:
            asked["steploom.prompt"] = str(request.prompt)
        return asked

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """A span without children."""
        span = self._tracer.start_span(SPAN, attributes=self._asked(request))
        span.set_attribute("steploom.outcome", refusal_of(error))
        self._fail(span, error)
        span.end()

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """The phase is a span."""
        assert isinstance(life, _Traced)
        child = self._tracer.start_span(phase, life.context, start_time=life.wall(began))
        child.end(life.wall(max(began, ended)))

    def lost(self, life: Life, at: float) -> None:
        """An event of its span."""
        assert isinstance(life, _Traced)
        life.span.add_event("restarted", {"steploom.attempt": life.attempt}, life.wall(at))

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """Ends its span."""
        assert isinstance(life, _Traced)
        span = life.span
        span.set_attribute("steploom.outcome", outcome_of(error))
        span.set_attribute("steploom.steps", life.steps)
        span.set_attribute("steploom.batch_requests.mean", life.mean_batch_requests)
        if life.attempt:
            span.set_attribute("steploom.attempt", life.attempt)
        if error is not None and outcome_of(error) != "completed":
            self._fail(span, error)
        span.end(life.wall(at))

    def _fail(self, span: Span, error: SteploomError) -> None:
        span.set_attribute("error.type", kind_of(error))
        said = str(error) if self._content else kind_of(error)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, said))


class _Traced(Life):
    """A request whose span is being recorded."""

    __slots__ = ("_zero", "context", "span")

    def __init__(self, request_id: str, submitted: float, span: Span, context: Context, zero: int) -> None:
        super().__init__(request_id, submitted)
        self.span, self.context, self._zero = span, context, zero

    def wall(self, at: float) -> int:
        """A time of the monotonic clock as Unix time in nanoseconds."""
        return self._zero + int(at * 1e9)
