"""Lanes: the workers of an engine, whose number may change while it serves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio.abc

from steploom.engine.lane import Lane
from steploom.engine.whole import WholeRequests
from steploom.errors import EngineDead, EngineError
from steploom.sched import Fleet, build_scheduler

if TYPE_CHECKING:
    from steploom.engine.core import EngineCore


class Lanes(list[Lane]):
    """A lane for each worker, by rank.

    Args:
        core: The engine. It gets a fleet of schedulers in the place of its scheduler once it has several workers.
        group: Owns the lanes' tasks.
        whole: Whether the executor executes whole requests.
    """

    def __init__(self, core: EngineCore, group: anyio.abc.TaskGroup, *, whole: bool) -> None:
        super().__init__()
        self._core = core
        self._group = group
        self._whole = whole
        if core.executor.workers > 1:
            core.scheduler = _fleet(core)

    def open(self) -> None:
        """Has the workers serve with which the executor has started."""
        for _ in range(self._core.executor.workers):
            self._open()

    def _open(self) -> None:
        """Has one more worker serve, which the executor has started."""
        core = self._core
        if len(self) and not isinstance(core.scheduler, Fleet):
            core.scheduler = fleet = _fleet(core)
            self[0].joins(fleet.members[0])
        scheduler = core.scheduler
        if isinstance(scheduler, Fleet):
            own = build_scheduler(core.config, core.clock) if len(self) else None
            scheduler = scheduler.members[0] if own is None else scheduler.add(own)
        ticks = WholeRequests(core.executor, self._group) if self._whole else core.executor
        self.append(Lane(core, len(self), ticks, scheduler))
        self._group.start_soon(self[-1].run)

    def kick(self) -> None:
        """There may be something to schedule, for any worker."""
        for lane in self:
            lane.ticking.kick()

    @property
    def still(self) -> bool:
        """Whether no worker has a tick under way."""
        return all(lane.ticking.still for lane in self)

    @property
    def fault(self) -> EngineError | None:
        """What a worker was lost by that is being replaced; None if all live."""
        return next((lane.recovery.fault for lane in self if lane.recovery.fault is not None), None)

    def check(self) -> None:
        """Raises:
        EngineError: A worker is being replaced; says why.
        """
        for lane in self:
            lane.recovery.check()

    async def idled(self) -> None:
        """Returns when no worker has anything to do, and all are there."""
        while not all(lane.ticking.idle for lane in self):
            for lane in self:
                await lane.ticking.idled()

    async def scale(self, workers: int, drain_s: float | None) -> None:
        """Adds workers, or has the last ones leave; see :meth:`AsyncDiffusionEngine.scale`."""
        core, operations = self._core, self._core.operations
        operations.check_still("scale()")
        operations.check_awake()
        operations.scaling = True
        try:
            while len(self) < workers:
                await self._add()
                core.check_serving()
                self._open()
                self.kick()
            while len(self) > workers:
                await core.while_alive(partial(self._close, drain_s))
        finally:
            operations.scaling = False

    async def _add(self) -> None:
        """Has the executor start one more worker.

        Raises:
            EngineError: It cannot; of this engine, which serves on, nobody is told that it is dead.
        """
        try:
            await self._core.while_alive(self._core.executor.add_worker)
        except EngineDead as error:
            if self._core.serves:
                raise EngineError(str(error)) from None
            raise

    async def _close(self, drain_s: float | None) -> None:
        """The last worker leaves, and is ended."""
        fleet = self._core.scheduler
        assert isinstance(fleet, Fleet)
        lane = self[-1]
        await lane.leave(drain_s)
        try:
            await lane.end()
        finally:  # From here on it is gone, also if somebody cancels.
            self.pop()
            fleet.dismiss()
            self._core.operations.changed()  # its last tick is under way no more
            await self._core.executor.remove_worker()


def _fleet(core: EngineCore) -> Fleet:
    assert not isinstance(core.scheduler, Fleet)
    return Fleet(core.config, core.scheduler)
