"""Lane: one worker as the engine sees it. Its tick loops, its death, its replacement, its leave."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from steploom.engine.asked import asked
from steploom.engine.outlast import outlast
from steploom.engine.recovery import Recovery, cause
from steploom.engine.ticking import Ticking
from steploom.engine.whole import WholeRequests
from steploom.errors import EngineError
from steploom.executor.abstract import DiffusionExecutor
from steploom.requests import Event
from steploom.sched import Member, SchedulerInterface

if TYPE_CHECKING:
    from steploom.engine.core import EngineCore

log = logging.getLogger("steploom.engine")


class Lane:
    """Keeps one worker busy until the engine ends, or the worker leaves.

    Args:
        core: The engine.
        worker: The worker's rank.
        executor: Executes its ticks; or makes it look as if another executor did.
        scheduler: Decides its ticks.

    Attributes:
        ticking: Its tick loops.
        recovery: Replaces the worker.
        ended: Set when it does nothing any more.
    """

    def __init__(
        self,
        core: EngineCore,
        worker: int,
        executor: DiffusionExecutor | WholeRequests,
        scheduler: SchedulerInterface | Member,
    ) -> None:
        config = core.config
        self._core = core
        self.worker = worker
        whole = isinstance(executor, WholeRequests)
        ahead = config.run_ahead and not whole and core.executor.ticks_in_flight > 1 and scheduler.runs_ahead
        self.recovery = Recovery(core.executor, config, core.observers, worker, self._hopeless, self._others)
        self.ticking = Ticking(executor, scheduler, core.observers, core.deliver, core.operations, ahead=ahead)
        self.ended = anyio.Event()
        self._lost = anyio.Event()
        self._stays = anyio.Event()
        self._stays.set()
        self._loops = anyio.CancelScope()
        self._scope = anyio.CancelScope()

    def joins(self, member: Member) -> None:
        """Its worker is one of several from now on."""
        if self.recovery.fault is not None:
            member.absent()
        self.ticking.scheduler = member

    @property
    def member(self) -> Member | None:
        """Its worker's part in the fleet; None if it is the only one."""
        return self.ticking.scheduler if isinstance(self.ticking.scheduler, Member) else None

    @property
    def state(self) -> str:
        """``"serves"``, ``"recovering"`` or ``"leaving"``."""
        if self.recovery.fault is not None:
            return "recovering"
        return "leaving" if self.member is not None and self.member.leaving else "serves"

    async def run(self) -> None:
        """Serves until it is cancelled, or :meth:`end`."""
        try:
            with self._scope:
                while True:
                    with anyio.CancelScope() as self._loops:
                        async with anyio.create_task_group() as loops:
                            for part in (*self.ticking.loops(), self._watch):
                                loops.start_soon(self._core.guarded, part, self._struck)
                    await self._core.guarded(self._recover)
        finally:
            self.ended.set()

    async def _watch(self) -> None:
        failed: Callable[..., Awaitable[EngineError]] = self._core.executor.wait_failed
        raise await asked(failed, *([self.worker] if self.worker else []))

    def _struck(self, error: Exception) -> None:
        """A fault has ended a loop: what the worker held is replayed by others, if there can be others."""
        if isinstance(error, EngineError) and self.recovery.fault is not None:
            return  # The other loops met it, too.
        try:
            fault = error if isinstance(error, EngineError) and self.recovery.begin(error) else None
        except Exception as another:  # noqa: BLE001 - the executor's boundary: it cannot even be told
            fault, error = None, another
        if fault is None:
            self._core.die(error)
            return
        log.warning("worker %d is lost, and is being replaced: %s", self.worker, fault)
        self._lost.set()
        self._loops.cancel()
        if self.ticking.forget():
            self.recovery.fruitful()
        scheduler = self.ticking.scheduler
        if isinstance(scheduler, Member):
            self._tell(scheduler.die(cause(fault)))
        else:
            self._tell(scheduler.restart(None, cause(fault)))

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._core.deliver(event)
        self._core.lanes.kick()

    async def _recover(self) -> None:
        await self._stays.wait()  # One that leaves is not replaced; whoever has it leave ends this, or has it stay.
        await self.recovery.run(self._resume)
        self._lost = anyio.Event()
        if self.member is not None:
            self.member.revive()
        self._core.operations.changed()
        self._core.lanes.kick()

    async def _resume(self) -> None:
        """A worker that takes the place of one that slept sleeps on."""
        slept = self._core.operations.slept
        if slept is not None:
            which = () if self.member is None else (self.worker,)
            await self._core.executor.sleep(slept, *which)

    def _hopeless(self) -> None:
        if self.member is not None:
            self.member.give_up()
            self._core.lanes.kick()

    def _others(self) -> bool:
        """Whether another worker serves, or may do so again."""
        return any(lane is not self and not lane.recovery.hopeless for lane in self._core.lanes)

    async def leave(self, limit_s: float | None) -> None:
        """Lets nobody in; returns when its worker holds nobody, or after ``limit_s``: then it is to :meth:`end`.

        A worker that is lost holds nobody. Cancelled, it serves on, or is replaced.
        """
        member = self.member
        assert member is not None
        self._stays = anyio.Event()
        member.leave()
        self._core.lanes.kick()
        try:
            with anyio.move_on_after(limit_s):
                await self._emptied()
        except BaseException:
            member.stay()
            self._stays.set()
            self._core.lanes.kick()
            raise

    async def _emptied(self) -> None:
        """Returns when its worker holds nobody, or is lost."""
        async with anyio.create_task_group() as group:

            async def lost() -> None:
                await self._lost.wait()
                group.cancel_scope.cancel()

            group.start_soon(lost)
            await self.ticking.idled()
            group.cancel_scope.cancel()

    async def end(self) -> None:
        """Stops its loops, whoever cancels; whom its worker still holds is replayed by others."""
        member = self.member
        assert member is not None
        self._scope.cancel()
        try:
            await outlast(self.ended)
        finally:
            self._tell(member.recall())
