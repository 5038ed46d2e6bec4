"""EngineObserver: who is told what an engine does, for metrics, traces and pictures of the batch."""

from __future__ import annotations

import logging

from steploom.engine.asked import called
from steploom.errors import EngineError, RequestError, SteploomError
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest

log = logging.getLogger("steploom.engine")


class EngineObserver:
    """Override what you want to be told, and append an instance to ``engine.observers``.

    Every method is called in the engine's event loop, between two ticks, and must return at once: the tick waits for
    it. One that raises is logged and told nothing more; no request suffers from it.

    Times are those of ``time.monotonic()``, in seconds.
    """

    def on_start(self, info: PipelineInfo) -> None:
        """The engine serves from now on: its workers are up. Again if it is started again."""

    def on_queued(self, request: DiffusionRequest) -> None:
        """The engine has accepted ``request``, and it waits. Called in the task (and context) that submits it."""

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """The engine has not accepted ``request``: the queue is full, or it does not fit the pipeline.

        Called in the task that submits it.
        """

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        """A tick is sent: who joins, who steps, and whom the workers forget.

        The tick before may still run. What is added to this one meanwhile is told likewise, with the same number; who
        was added too late is a member of a later tick, as :meth:`on_tick` tells.
        """

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """A tick is over: who was scheduled, and what that did for each; ``began`` to ``ended`` with the way there."""

    def on_fault(self, fault: EngineError) -> None:
        """A worker is lost, and is being replaced; those that it held are told by :meth:`on_restarted`, or end."""

    def on_recovered(self, seconds: float) -> None:
        """The worker was replaced, which took so long. Ticks go on."""

    def on_restarted(self, request_id: str, attempt: int) -> None:
        """A worker has lost the request; it waits again, for its next attempt (from 1)."""

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """A request that had been accepted has its outcome: one of both. Called once for each."""


class Observers(list[EngineObserver], EngineObserver):
    """The observers of an engine, told one after the other; who raises is dropped."""

    def on_start(self, info: PipelineInfo) -> None:
        """Tells each."""
        self._tell("on_start", info)

    def on_queued(self, request: DiffusionRequest) -> None:
        """Tells each."""
        self._tell("on_queued", request)

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """Tells each."""
        self._tell("on_refused", request, error)

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        """Tells each."""
        self._tell("on_schedule", output, at)

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """Tells each."""
        self._tell("on_tick", output, result, began, ended)

    def on_fault(self, fault: EngineError) -> None:
        """Tells each."""
        self._tell("on_fault", fault)

    def on_recovered(self, seconds: float) -> None:
        """Tells each."""
        self._tell("on_recovered", seconds)

    def on_restarted(self, request_id: str, attempt: int) -> None:
        """Tells each."""
        self._tell("on_restarted", request_id, attempt)

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """Tells each."""
        self._tell("on_end", request_id, output, error)

    def _tell(self, method: str, *what: object) -> None:
        for observer in list(self):
            try:
                called(getattr(observer, method), *what)
            except Exception:  # the observer's boundary: recorded, and no request is hurt
                log.exception("observer %r raised, and is told nothing more", observer)
                self.remove(observer)
