"""The clauses about whoever waits and leaves: by being cancelled, or by a time-out of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, cast

import anyio

from steploom.protocol import SchedulerOutput
from steploom.testing.subject import Call, Subject, together

TRIES = 6
"""How often somebody leaves, each time after half as long."""
KEPT = 2
"""How often somebody who left may have had an answer all the same: once, if it came at that very moment."""
WATCHED_S = 0.01
"""How long it is waited for a failure, until that is left."""


async def cancelled_tick(subject: Subject) -> None:
    """Whoever awaits a tick may leave, before it has begun and while it runs; the next one is answered all the same."""
    executor, there = subject.executor, list[str]()

    def join(ended: list[str]) -> SchedulerOutput:
        there.append((new := subject.new()).run_id)
        return subject.decide(new, ended=ended)

    async def work() -> None:
        await executor.execute_step(join([]))  # a tick that is cancelled may never come to anybody: it ends nobody

    async def after() -> None:
        ended = there[:]
        with subject.clause("cancellation"):
            result = await executor.execute_step(following := join(ended))
        del there[: len(ended)]
        told = f"after a cancelled tick, tick {following.tick} was answered as {result.tick}"
        subject.require(result.tick == following.tick, "cancellation", told)

    await _leave(subject, work, after)
    await subject.tick(ended=there)


async def cancelled_requests(subject: Subject) -> None:
    """Who waits for a request may leave, before it has begun and while it runs; the next one is served."""

    async def work() -> None:
        await subject.executor.execute_model([subject.request()])

    async def after() -> None:
        with subject.clause("cancellation"):
            (output,) = await subject.executor.execute_model([subject.request()])
        told = f"after a cancelled request the next failed: {output.error}"
        subject.require(output.error is None, "cancellation", told)

    await _leave(subject, work, after)


async def _leave(subject: Subject, work: Call, after: Call) -> None:
    """Leaves work at once, and then in its midst: how long it takes is measured, and may be less the next time.

    Args:
        subject: The executor.
        work: What is left.
        after: The same, and whether it is answered.
    """
    await _left(subject, "cancellation", work, 0)
    begun = time.monotonic()
    await after()
    took = time.monotonic() - begun
    for leave in (_left, _cancelled):
        kept = 0
        for halved in range(1, TRIES):
            outcome = await leave(subject, "cancellation", work, took / 2**halved)
            await after()
            if outcome.caught:
                break
            kept += outcome.called
            told = "who was cancelled at work had an answer, and no CancelledError"
            subject.require(kept < KEPT, "cancellation", told)


class Outcome(NamedTuple):
    """Of leaving a call."""

    called: bool
    """It was cancelled."""
    caught: bool
    """It ended by that."""


async def _left(subject: Subject, clause: str, call: Call, seconds: float) -> Outcome:
    """Awaits a call for so long, in a scope."""

    async def waiting() -> Outcome:
        with anyio.move_on_after(seconds) as scope:
            await call()
        return Outcome(scope.cancel_called, scope.cancelled_caught)

    return await _outcome(subject, clause, waiting)


async def _cancelled(subject: Subject, clause: str, call: Call, seconds: float) -> Outcome:
    """Awaits a call in a task that is cancelled after so long: once, where a scope repeats it."""

    async def waiting() -> Outcome:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
        try:
            await call()
        except asyncio.CancelledError:
            if not task.cancelling():
                raise
            task.uncancel()
            return Outcome(called=True, caught=True)
        finally:
            timer.cancel()
        return Outcome(called=task.cancelling() > 0, caught=False)

    return await _outcome(subject, clause, waiting)


async def _outcome(subject: Subject, clause: str, waiting: Callable[[], Awaitable[Outcome]]) -> Outcome:
    with subject.clause(clause):
        (answer,) = await together(waiting)
        if isinstance(answer, Exception):
            raise answer
    return answer


async def unwatched(subject: Subject) -> None:
    """Who waits for a failure may leave."""
    for seconds in (0, WATCHED_S):
        outcome = await _left(subject, "wait_failed", subject.executor.wait_failed, seconds)
        subject.require(outcome.caught, "wait_failed", "it returned while the executor served")
