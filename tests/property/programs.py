"""What a world knows of its requests: their courses, and how far they have come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput


@dataclasses.dataclass
class Program:
    """The course of one request: a key for each tick that it is scheduled for; None is a tick of encoding.

    ``kills``: the worker dies in that tick of it, whenever it comes to it.
    """

    shape: int
    priority: int
    keys: list[str | None]
    fails: bool
    kills: int | None = None


@dataclasses.dataclass
class Known:
    """What the world knows about one live request."""

    program: Program
    arrival: int
    submitted: float
    replays: int = 0
    run: str | None = None
    observed: str | None = None
    queued_s: float | None = None
    reports: list[RequestReport] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Flight:
    """A tick that was decided and not answered yet."""

    output: SchedulerOutput
    result: RunnerOutput | None = None


def begin(flights: Sequence[Flight], live: Mapping[str, Known], now: float) -> None:
    """The worker turns to the first of these ticks: those that join in it have waited until now."""
    for new in flights[0].output.scheduled_new_reqs if flights else ():
        known = live.get(new.request.request_id)
        if known is not None and known.run == new.run_id and not known.replays:
            known.queued_s = now - known.submitted


def true_key(shape: int) -> str:
    """The observed key of a shape in a stable world; two guesses share each."""
    return f"key{shape // 2}"
