"""What a world knows of its requests: their courses, and how far they have come."""

from __future__ import annotations

import dataclasses

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
