"""The open-loop driver: sends a workload's requests at their times, whatever the server does, and notes what became of
each.

A client that waits for an answer before it sends the next request slows down with the server that it measures, and
never sees a queue. So each request has a task of its own, started at its time; there are as many as the workload has
requests, and no more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import anyio

from steploom.cli.benches.workloads import Arrival


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a target says of a request that is done.

    Attributes:
        steps: Denoising steps that were made; 0 where nobody says.
        images: Images that came.
        mean_batch_requests: How many requests shared its denoiser calls on average; None where nobody says.
        first_preview_at: ``time.monotonic()`` when its first preview was here; None if there was none.
    """

    steps: int = 0
    images: int = 1
    mean_batch_requests: float | None = None
    first_preview_at: float | None = None


class Target(Protocol):
    """What is measured."""

    async def send(self, index: int, arrival: Arrival) -> Answer:
        """Has one request done. What it raises is noted as that request's failure.

        Args:
            index: Of the request in its workload: prompt and seed follow from it.
            arrival: What is asked for.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request. Times are seconds since the load began.

    Attributes:
        index: Of the request in its workload.
        arrival: What was asked for.
        due_s: When it should have been sent; of a closed loop, when it was.
        sent_s: When it was sent.
        ended_s: When its answer was complete, or it failed.
        answer: What the target said; None if it failed.
        error: Why it failed, in a line; None if it did not.
        first_preview_s: When its first preview was here; None if there was none.
    """

    index: int
    arrival: Arrival
    due_s: float
    sent_s: float
    ended_s: float
    answer: Answer | None = None
    error: str | None = None
    first_preview_s: float | None = None

    @property
    def latency_s(self) -> float:
        """Seconds from when it was due to its answer: what a late client held back counts as well."""
        return self.ended_s - self.due_s

    @property
    def lateness_s(self) -> float:
        """Seconds that it was sent too late."""
        return self.sent_s - self.due_s


class Load:
    """One run of a workload against a target.

    Args:
        target: What is measured.
        arrivals: The workload.
        limit: Requests in flight at most; the others wait here, which counts into their latencies. None: no limit, an
            open loop.
        timeout_s: Seconds after which a request that was sent is given up, and cancelled; None waits for ever.
        closed: A closed loop: a request is due when a place is free, so waiting for one does not count.
        first: Index of the first request: prompts and seeds follow from it.
        on_change: Is called whenever a request was sent or has ended, and must return at once.
        now: The clock, in seconds.
        sleep: Waits so many seconds of that clock.

    Attributes:
        outcomes: Of the requests that have ended, in that order; complete once :meth:`run` has returned.
        sent: Requests that were sent.
        failed: Requests that have failed.
        peak: Requests that were in flight at a time, at most.
    """

    def __init__(
        self,
        target: Target,
        arrivals: Sequence[Arrival],
        *,
        limit: int | None = None,
        timeout_s: float | None = None,
        closed: bool = False,
        first: int = 0,
        on_change: Callable[[Load], None] | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.arrivals = sorted(enumerate(arrivals, first), key=lambda one: one[1].at_s)
        self.outcomes: list[Outcome] = []
        self.sent = self.peak = self.failed = 0
        self._target, self._timeout_s, self._closed = target, timeout_s, closed
        self._limit = limit
        self._on_change, self._now, self._sleep = on_change, now, sleep
        self._began: float | None = None
        self._ended: float | None = None

    @property
    def duration_s(self) -> float:
        """Seconds from the beginning to the end of the last request, or until now while it runs."""
        if self._began is None:
            return 0.0
        return (self._now() if self._ended is None else self._ended) - self._began

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return self.sent - len(self.outcomes)

    async def run(self) -> list[Outcome]:
        """Sends them all and waits for them all. Cancelled, it cancels those in flight; ``outcomes`` has the others."""
        self._began = self._now()
        places = anyio.Semaphore(self._limit or max(1, len(self.arrivals)))
        try:
            async with anyio.create_task_group() as group:
                for index, arrival in self.arrivals:
                    early = self._began + arrival.at_s - self._now()
                    if early > 0:
                        await self._sleep(early)
                    group.start_soon(self._one, index, arrival, places)
        finally:
            self._ended = self._now()
        return self.outcomes

    async def _one(self, index: int, arrival: Arrival, places: anyio.Semaphore) -> None:
        async with places:
            sent = self._since()
            self.sent += 1
            self.peak = max(self.peak, self.in_flight)
            self._changed()
            answer, error = await self._answer(index, arrival)
        self.failed += error is not None
        preview = answer.first_preview_at if answer is not None else None
        self.outcomes.append(
            Outcome(
                index=index,
                arrival=arrival,
                due_s=sent if self._closed else arrival.at_s,
                sent_s=sent,
                ended_s=self._since(),
                answer=answer,
                error=error,
                first_preview_s=None if preview is None else preview - (self._began or 0.0),
            )
        )
        self._changed()

    async def _answer(self, index: int, arrival: Arrival) -> tuple[Answer | None, str | None]:
        """The target's answer, or why there is none."""
        answer: Answer | None = None
        try:
            with anyio.move_on_after(self._timeout_s) as patience:
                answer = await self._target.send(index, arrival)
            if patience.cancelled_caught:
                return None, f"timeout: no answer within {self._timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - the request's boundary: recorded, and the others go on
            return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return answer, None

    def _since(self) -> float:
        return self._now() - (self._began or 0.0)

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)
