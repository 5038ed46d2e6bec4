"""Operations: what the operator of an engine has asked for. Pause and resume, drain, sleep and wake."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from steploom.engine.asked import called
from steploom.engine.observer import EngineObserver
from steploom.engine.recovery import failure
from steploom.errors import (
    EngineDead,
    EngineError,
    EngineNotRunning,
    InvalidRequest,
    RequestCancelled,
    RequestError,
    SteploomError,
)
from steploom.protocol import SchedulerOutput
from steploom.requests import DiffusionOutput

if TYPE_CHECKING:
    from steploom.engine.core import EngineCore


class Operations:
    """What holds for all cores of an engine: the one that serves, and those whose model was replaced.

    Whoever pauses or drains waits. Until that is over it is the caller's wish, and goes with the caller; afterwards it
    is the engine's state, until :meth:`resume`. Who has the engine sleep, or wake up, may leave as well; but what the
    workers were told is seen through, so that what holds of them is what holds of the engine.

    Attributes:
        cores: The one that serves is the last one; the others end once their requests have.
        slept: How deep the workers sleep; None if they do not.
        reloading: Whether a model is being replaced.
        scaling: Whether workers are being added or removed.
    """

    def __init__(self) -> None:
        self.cores: list[EngineCore] = []
        self.slept: int | None = None
        self.reloading = self.scaling = False
        self._paused = self._drained = False
        self._pausing: set[object] = set()
        self._draining: set[object] = set()
        self._falling: set[object] = set()  # asleep: wishes of callers, then the workers'
        self._changed = anyio.Event()

    @property
    def asleep(self) -> bool:
        """Whether no requests are taken, since the workers sleep, or will."""
        return self.slept is not None or bool(self._falling)

    @property
    def paused(self) -> bool:
        """Whether no tick may begin."""
        return self._paused or bool(self._pausing)

    @property
    def draining(self) -> bool:
        """Whether no requests are taken, since those that were accepted are to end."""
        return self._drained or bool(self._draining)

    def gone(self, core: EngineCore) -> None:
        """A core has ended: unless it is the one that says why nothing is served, it is of no interest any more."""
        if core in self.cores[:-1]:
            self.cores.remove(core)
            self.changed()

    def failure(self, core: EngineCore, error: Exception) -> SteploomError:
        """What ``core`` is dead of that ``error`` ends; the engine is not, if another one serves."""
        fault = failure(error)
        if core not in self.cores[:-1] or not isinstance(fault, EngineDead):
            return fault
        other = EngineError(str(fault))
        for note in getattr(fault, "__notes__", ()):
            other.add_note(note)
        return other

    def abort(self, request_id: str, error: RequestError) -> bool:
        """Ends a request, whoever has it; whether it was alive."""
        return any(core.finish(request_id, error) for core in self.cores)

    def changed(self) -> None:
        """Something has happened for which somebody may wait."""
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when ``condition`` holds."""
        while not condition():
            await self._changed.wait()

    async def _outlive(self, core: EngineCore, condition: Callable[[], bool]) -> None:
        """Returns when ``condition`` holds, though another core replaces this one meanwhile.

        Raises:
            EngineError: The engine has ended.
        """
        while True:
            try:
                return await core.while_alive(partial(self.until, condition))
            except EngineError:
                if core is self.cores[-1]:
                    raise
                core = self.cores[-1]

    def _kick(self) -> None:
        for core in self.cores:
            core.lanes.kick()
        self.changed()

    def check_open(self) -> None:
        """Raises:
        EngineNotRunning: No requests are taken; says why.
        """
        self.check_awake()
        if self.draining:
            raise EngineNotRunning("the engine drains, and takes no new requests: await resume() first")

    def check_awake(self) -> None:
        """Raises:
        EngineNotRunning: The workers sleep, or will.
        """
        if self.asleep:
            raise EngineNotRunning("the engine sleeps: await wake_up() first")

    def check_id(self, request_id: str) -> None:
        """Raises:
        InvalidRequest: A request of a model that was replaced has this id.
        """
        if any(request_id in core.live for core in self.cores[:-1]):
            raise InvalidRequest(
                f"request_id={request_id!r}: a live request has this id; choose another or leave it out",
                field="request_id",
            )

    def check_still(self, what: str) -> None:
        """Raises:
        EngineError: ``what`` has to wait.
        """
        if self.paused:
            raise EngineError(f"{what}: the engine is paused, so that its requests cannot end: await resume() first")
        for other, under_way in (("reload()", self.reloading), ("scale()", self.scaling)):
            if under_way:
                raise EngineError(f"{what}: {other} is under way: await it first")

    async def pause(self, core: EngineCore) -> None:
        """Lets no tick begin; returns when none is under way. Resumed before that, it goes on.

        Raises:
            EngineError: The engine has ended meanwhile; or it executes whole requests.
        """
        if core.executor.granularity == "request":
            raise EngineError(f"{type(core.executor).__name__} executes whole requests, which cannot pause")
        wish = object()
        self._pausing.add(wish)
        try:
            await self._outlive(core, lambda: wish not in self._pausing or self._still())
            self.cores[-1].check_serving()
            self._paused |= wish in self._pausing
        finally:
            self._pausing.discard(wish)
            if not self.paused:
                self._kick()  # its caller has left, so that nobody wants it any more
        for one in self.cores:
            self.unwind(one)

    def _still(self) -> bool:
        return all(core.lanes.still for core in self.cores)

    def unwind(self, core: EngineCore) -> None:
        """Has workers forget requests that ended while no tick may begin which would say so."""
        if not self._paused or not core.lanes.still:
            return
        for output in core.residents.take_lapsed():
            if output.worker >= len(core.lanes):
                continue  # it has left
            try:
                called(core.executor.amend, output)
            except SteploomError:  # lost by its worker; or the next tick says so
                continue
            except Exception as error:  # noqa: BLE001 - the executor's boundary: not the fault of whoever has left
                core.die(error)

    def resume(self) -> None:
        """Lets ticks begin, and requests in. Who waits for a pause or a drain waits no longer."""
        self._drained = False
        self._draining.clear()
        self._go_on()

    def _go_on(self) -> None:
        """Lets ticks begin."""
        self._paused = False
        self._pausing.clear()
        for core in self.cores:
            core.residents.take_lapsed()  # the next tick tells of them
        self._kick()

    async def drain(self, core: EngineCore, timeout_s: float | None) -> int:
        """Lets nobody in; returns when everybody has an outcome. A pause ends: who is to end has to go on.

        Returns:
            How many had none after ``timeout_s`` seconds, and were ended. Resumed before that, it ends nobody.

        Raises:
            EngineError: The engine has ended meanwhile.
        """
        wish = object()
        self._draining.add(wish)
        self._go_on()
        ended = 0
        try:
            with anyio.move_on_after(timeout_s):
                await self._outlive(core, lambda: wish not in self._draining or not self._live())
            self.cores[-1].check_serving()
            if wish in self._draining:
                self._drained = True
                ended = self._end_all(f"was not done within timeout_s={timeout_s}, when the engine was drained")
        finally:
            self._draining.discard(wish)
            self.changed()
        return ended

    def _live(self) -> bool:
        return any(core.live for core in self.cores)

    def _end_all(self, why: str) -> int:
        return sum(
            core.finish(request_id, RequestCancelled(f"request {request_id} {why}", drained=True))
            for core in self.cores
            for request_id in list(core.live)
        )

    async def fall_asleep(self, core: EngineCore, level: int) -> None:
        """Takes no more requests, lets those that it has end, then moves the weights off the device.

        Woken before that, it stays awake; so it does if the caller leaves before that, unless somebody else wants it to
        sleep, too.

        Raises:
            EngineError: The engine cannot serve, or has ended meanwhile; or is paused, reloads or scales.
        """
        self.check_still("sleep()")
        wish = object()
        self._falling.add(wish)
        try:
            await core.while_alive(partial(self.until, lambda: self.cores == [core]))  # reload() may have been left
            await core.while_alive(core.idled)
        except BaseException:
            self._falling.discard(wish)
            raise
        if wish in self._falling:
            await core.see_through(partial(self._lull, core, level, wish))

    async def _lull(self, core: EngineCore, level: int, wish: object) -> None:
        """Has all workers sleep, or if one refuses, none that did not."""
        try:
            await self._have_all(core, partial(core.executor.sleep, level))
            if wish in self._falling:
                self.slept = max(level, self.slept or level)  # who sleeps deeper goes on doing so
        except SteploomError:
            if self.slept is None and self._falling == {wish}:
                with contextlib.suppress(SteploomError):
                    await self._have_all(core, core.executor.wake_up)
            raise
        finally:
            self._falling.discard(wish)

    async def wake_up(self, core: EngineCore) -> None:
        """Moves the weights back and takes requests again.

        Raises:
            EngineError: The engine cannot serve, or has ended meanwhile; or a worker is being replaced.
        """
        core.lanes.check()
        await core.see_through(partial(self._rouse, core))

    async def _rouse(self, core: EngineCore) -> None:
        meant = set(self._falling)  # who has it sleep from now on comes later
        await self._have_all(core, core.executor.wake_up)
        self.slept = None
        self._falling -= meant

    async def _have_all(self, core: EngineCore, call: Callable[[], Awaitable[object]]) -> None:
        """Has all workers do it; if one is lost meanwhile, once more when it was replaced, ``max_retries`` times."""
        left = core.config.max_retries
        while True:
            await core.while_alive(partial(self.until, lambda: core.lanes.fault is None))
            try:
                await core.ask(call)
            except SteploomError:
                if core.lanes.fault is None or not left:
                    raise
                left -= 1
            else:
                return


class Residents(EngineObserver):
    """Whom the workers of a core hold, or have lost: these wait to be replayed, by the same model and no other.

    Args:
        operations: Say whether ticks may begin.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._forgets: dict[str, SchedulerOutput | None] = {}
        self._lapsed: list[SchedulerOutput] = []

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._forgets

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        """Notes who joins, and what to tell its worker to have it forgotten: an amendment that comes too late."""
        for new in output.scheduled_new_reqs:
            self._forgets[new.request.request_id] = msgspec.structs.replace(
                output, scheduled_new_reqs=[], scheduled_cached_reqs=[], finished_req_ids=[new.run_id]
            )

    def on_restarted(self, request_id: str, attempt: int) -> None:
        """Nobody holds it, for now."""
        self._forgets[request_id] = None

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """Its worker may have to be told."""
        forget = self._forgets.pop(request_id, None)
        if forget is not None and error is not None and self._operations.paused:
            self._lapsed.append(forget)

    def take_lapsed(self) -> list[SchedulerOutput]:
        """What workers have not been told while no tick may begin."""
        lapsed, self._lapsed = self._lapsed, []
        return lapsed
