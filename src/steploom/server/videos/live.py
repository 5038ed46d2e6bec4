"""Live: what only this process knows of a job that is not done."""

from __future__ import annotations

import anyio

from steploom import Restarted, StepEvent
from steploom.requests import Event


class Live:
    """What only this process knows of a job that is not done.

    Attributes:
        scope: Cancelled to end it.
        ended: Set when its task has ended.
        step: Steps done.
        total: Steps in all, if known.
        accepted: Whether it is stored, so that its client has, or gets, its id.
        counted: Whether an attempt has begun, and is counted.
        blamed: Whether it stays so: it may be this job that the engine has died of.
    """

    def __init__(self, *, accepted: bool) -> None:
        self.accepted = accepted
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()
        self.step = 0
        self.total: int | None = None
        self.counted = self.blamed = False

    def see(self, event: Event) -> None:
        """Takes in an event of the job's request."""
        if isinstance(event, StepEvent):
            self.step, self.total = event.step, event.total_steps
        elif isinstance(event, Restarted):
            self.step = 0
