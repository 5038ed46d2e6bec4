"""RequestLog: tells the line of an HTTP request what the engine did for it."""

from __future__ import annotations

import logging
from typing import Any

from steploom.errors import GenerationFailed, RequestError, SteploomError
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.server.telemetry.record import RECORD, Record
from steploom.telemetry.lives import Life, Lives
from steploom.telemetry.outcomes import kind_of, outcome_of, refusal_of

log = logging.getLogger(__name__)
lines = logging.getLogger("steploom.access")


class RequestLog(Lives):
    """Adds each request of the engine to the HTTP request that submitted it; one that has none left gets its own line.

    What a pipeline said when it failed may hold a prompt: it is told at level INFO, which is not shown by default.
    """

    def born(self, request: DiffusionRequest, at: float) -> Life:
        """Notes whose it is."""
        return _Logged(request.request_id, at, RECORD.get())

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """It has an outcome at once."""
        record = RECORD.get()
        if record is not None:
            record.add({"outcome": refusal_of(error), "error": kind_of(error)})

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """Notes how long it waited."""
        assert isinstance(life, _Logged)
        if phase == "queued":
            life.queued_s += ended - began

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """Its line, or a part of one."""
        assert isinstance(life, _Logged)
        part: dict[str, Any] = {
            "outcome": outcome_of(error), "queued_s": life.queued_s, "steps": life.steps,
            "batch_requests": life.mean_batch_requests,
        }  # fmt: skip
        if error is not None and part["outcome"] != "completed":
            part["error"] = kind_of(error)
        if isinstance(error, GenerationFailed):
            log.info("request %s failed: %s\n%s", life.request_id, error, error.remote_traceback)
        if life.record is not None and not life.record.ended:
            life.record.add(part)
            return
        told = {**part, "request_id": life.request_id if life.record is None else life.record.request_id}
        told |= {"engine_request_id": life.request_id, "seconds": round(at - life.submitted, 6)}
        lines.info("request %s %s", life.request_id, part["outcome"], extra=told)


class _Logged(Life):
    """A request, and whose it is."""

    __slots__ = ("queued_s", "record")

    def __init__(self, request_id: str, submitted: float, record: Record | None) -> None:
        super().__init__(request_id, submitted)
        self.record = record
        self.queued_s = 0.0
