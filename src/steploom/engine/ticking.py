"""Ticking: the loops that keep the workers busy. One of them decides a tick, sends it, and takes in what it did."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel

from steploom.engine.asked import answered, called
from steploom.engine.flights import Flights
from steploom.engine.observer import Observers
from steploom.engine.operations import Operations
from steploom.engine.whole import WholeRequests
from steploom.executor.abstract import DiffusionExecutor
from steploom.protocol import RunnerOutput
from steploom.requests import Event
from steploom.sched import Member, SchedulerInterface


class Ticking:
    """The tick loops of one worker; the engine owns the tasks that run them.

    Args:
        executor: Executes ticks; or makes it look as if another executor did.
        scheduler: Decides them; may become a member of a fleet.
        observers: Are told.
        deliver: Takes the events.
        operations: Say whether ticks may begin.
        ahead: Whether a tick is sent while the one before it runs.

    Attributes:
        scheduler: Decides the ticks.
    """

    def __init__(
        self,
        executor: DiffusionExecutor | WholeRequests,
        scheduler: SchedulerInterface | Member,
        observers: Observers,
        deliver: Callable[[Event], None],
        operations: Operations,
        *,
        ahead: bool,
    ) -> None:
        self._executor = executor
        self.scheduler = scheduler
        self._observers = observers
        self._deliver = deliver
        self._operations = operations
        self._flights = Flights(2 if ahead else 1)
        self._answered = False
        self._lost = False
        self._work = anyio.Event()
        self._idle = anyio.Event()

    def loops(self) -> list[Callable[[], Awaitable[object]]]:
        """What is to run, side by side; each until it is cancelled, or the executor fails."""
        self._lost = False
        loops: list[Callable[[], Awaitable[object]]] = [self._tick_loop] * self._flights.most
        return [*loops, self._amend_loop] if self._flights.most > 1 else loops

    def kick(self) -> None:
        """There may be something to schedule."""
        if self.scheduler.has_work:
            self._busy()
        self._work.set()
        self._flights.look_again()
        if isinstance(self._executor, WholeRequests):
            self._executor.poke()

    def _busy(self) -> None:
        if self._idle.is_set():
            self._idle = anyio.Event()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and a worker that would do it."""
        return self._idle.is_set()

    @property
    def still(self) -> bool:
        """Whether no tick is under way."""
        return not self._flights

    async def idled(self) -> None:
        """Returns when there is nothing to do, and a worker that would do it."""
        while not self._idle.is_set():
            await self._idle.wait()

    def forget(self) -> bool:
        """The loops are being ended, and what they have sent is answered no more: others may be run then.

        Returns:
            Whether any tick was answered since the last time.
        """
        answered, self._answered = self._answered, False
        self._lost = True
        self._flights.forget()
        self._operations.changed()
        self._busy()
        if isinstance(self._executor, WholeRequests):
            self._executor.forget()
        return answered

    async def _tick_loop(self) -> None:
        """Two of these take turns where ticks are sent ahead: one sends the next tick while the other's runs."""
        while True:
            await self._wait_for_work()
            flight = self._flights.depart(self.scheduler.schedule())
            self._observers.on_schedule(flight.output, flight.sent)
            flight.result = await answered(RunnerOutput, self._executor.execute_step, flight.output)
            self._take_note()

    def _take_note(self) -> None:
        """Takes in the answers that are there, in the order of the ticks."""
        for output, result, began, ended in self._flights.land():
            self._answered = True
            self._observers.on_tick(output, result, began, ended)
            for event in self.scheduler.update_from_output(output, result):
                self._deliver(event)
        if self._operations.paused and not self._flights:
            self._operations.changed()
        if self.scheduler.has_work:
            self._work.set()

    async def _amend_loop(self) -> None:
        """Who comes, or goes, while the next tick waits behind the one that runs, is in that next one all the same."""
        assert not isinstance(self._executor, WholeRequests)
        while True:
            flight = await self._flights.amendable()
            if (amendment := self.scheduler.amend()) is not None:
                flight.amendments.append(amendment)
                self._observers.on_schedule(amendment, time.monotonic())
                called(self._executor.amend, amendment)

    async def _wait_for_work(self) -> None:
        """Returns when there is something to schedule. The event loop gets a turn in every tick, whatever runs it."""
        await anyio.lowlevel.checkpoint()
        # Who was woken in the turn in which the loops are cancelled comes by here once more: it is to send nothing.
        while self._lost or self._operations.paused or not self.scheduler.has_work:
            if not (self._lost or self._flights or self.scheduler.has_work):
                self._idle.set()
            if self._work.is_set():
                self._work = anyio.Event()
            await self._work.wait()
