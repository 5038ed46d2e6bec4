"""EngineCore: one life of an engine, from the start of its executor to its shutdown."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

import anyio
import anyio.lowlevel

from steploom.config import EngineConfig
from steploom.engine.asked import answered, asked
from steploom.engine.checks.generators import Borrowed
from steploom.engine.checks.validation import check_arguments, validate
from steploom.engine.clock import Clock
from steploom.engine.costs_file import CostsFile
from steploom.engine.lanes import Lanes
from steploom.engine.live import LiveRequests
from steploom.engine.mailbox import Mailbox, fresh
from steploom.engine.observer import Observers
from steploom.engine.operations import Operations, Residents
from steploom.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineNotRunning,
    RequestCancelled,
    RequestError,
    SteploomError,
)
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionRequest, Event, Failed, Finished, Restarted, StepEvent
from steploom.sched import Fleet, SchedulerInterface, build_scheduler

T = TypeVar("T")


class EngineCore:
    """Scheduler, executor and mailboxes of a running engine.

    One task owns it: the one that runs :meth:`run`, whose task groups hold tick loops and death watch. State changes
    only in synchronous methods, called in the same event loop; so it is whole at every await, and no lock is needed.

    Args:
        config: Settings.
        executor: Not started yet; belongs to the core from now on.
        on_progress: Is told what is being loaded.
        observers: Are told what it does.
        operations: What its operator has asked for; shared with the core whose model this one is to replace.

    Attributes:
        scheduler: Who runs when.
        lanes: Its workers, by rank.
        live: Requests that have no outcome yet.
        residents: Whom the workers hold, or have lost.
        observers: Are told what it does: the residents, and those that were given.
        clock: Of all its schedulers.
        info: What the executor says about the pipeline; None until it has started.
        failure: The fault that ended it, if one did.
        started: Set once it serves, or has ended without ever serving.
        ended: Set when nothing of it is left: no task, no program, no process.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: DiffusionExecutor,
        on_progress: ProgressCallback | None = None,
        observers: Observers | None = None,
        operations: Operations | None = None,
    ) -> None:
        CostsFile.check(config)
        whole = executor.granularity == "request"
        if whole:  # A whole request cannot pause: everything resident runs.
            config = dataclasses.replace(config, max_resident=config.batch_limit)
        self.config = config
        self.executor = executor
        self._on_progress = on_progress
        self.operations = Operations() if operations is None else operations
        self.residents = Residents(self.operations)
        self.observers = Observers([self.residents, Observers() if observers is None else observers])
        self.clock = Clock()
        self.scheduler: SchedulerInterface | Fleet = build_scheduler(config, self.clock)
        self.info: PipelineInfo | None = None
        self.failure: SteploomError | None = None
        self.started = anyio.Event()
        self.ended = anyio.Event()
        self.live = LiveRequests(self._expire, self.operations.changed)
        self._calls: set[anyio.CancelScope] = set()
        self._asked = 0  # calls that the workers have not answered
        self._stopping = False
        self._scope = anyio.CancelScope()
        self._group = anyio.create_task_group()
        self.lanes = Lanes(self, self._group, whole=whole)

    async def run(self) -> None:
        """Serves until :meth:`stop` or a fault, and leaves nothing behind. A fault is kept in ``failure``."""
        try:
            with self._scope:
                await self.guarded(self._serve)
        finally:
            self._end_all(RequestCancelled("the engine was closed before the request was done"))
            try:
                with anyio.CancelScope(shield=True):
                    await self.guarded(self.executor.shutdown)
            finally:  # asyncio.run cancels even what is shielded when Ctrl-C comes twice
                self.started.set()
                self.ended.set()
                self.operations.gone(self)

    async def _serve(self) -> None:
        self.info = await answered(PipelineInfo, self.executor.start, self._on_progress)
        self.observers.on_start(self.info)
        async with self._group:
            self.lanes.open()
            self.started.set()

    @property
    def in_process(self) -> bool:
        """Whether objects pass to the pipeline and back as they are."""
        return self.info is not None and self.info.in_process

    def check(self, request: DiffusionRequest) -> PipelineInfo:
        """Raises what :meth:`submit` would, as far as that can be told before the request's pictures are read.

        Returns:
            The pipeline that will do it.
        """
        assert self.info is not None
        return check_arguments(request, self.info, self.config)

    def submit(self, request: DiffusionRequest, member: PipelineInfo | None = None) -> Mailbox:
        """Queues ``request``; its events will be in the mailbox. ``member``: what :meth:`check` said of it, if asked.

        Raises:
            InvalidRequest: It does not fit the pipeline or the limits.
            QueueFull: No place in the waiting queue.
            EngineError: The engine cannot serve.
        """
        self.check_serving()
        assert self.info is not None
        self.operations.check_open()
        with self.refusals(request):
            self.operations.check_id(request.request_id)
            validate(request, self.info, self.config, member)
            borrowed = Borrowed(request)
            borrowed.request = borrowed.request.in_context()
            queued = self.scheduler.add_request(borrowed.request)
        mailbox = Mailbox()
        self.live.enter(borrowed, mailbox, request.timeout)
        mailbox.put(queued)
        self.observers.on_queued(request)
        self.lanes.kick()
        return mailbox

    @contextlib.contextmanager
    def refusals(self, request: DiffusionRequest) -> Generator[None]:
        """Tells the observers when ``request`` is refused within."""
        try:
            yield
        except RequestError as error:
            self.observers.on_refused(request, error)
            raise

    def finish(self, request_id: str, error: RequestError) -> bool:
        """Ends a live request from outside, now: its reader gets ``error``, its slot is free by the next step.

        Returns:
            Whether it was alive.
        """
        events = self.scheduler.finish_requests([request_id], error)
        for event in events:
            self.deliver(event)
        self.lanes.kick()
        self.operations.unwind(self)
        return bool(events)

    def withdraw(self, request_id: str, mailbox: Mailbox) -> None:
        """The reader of ``mailbox`` has left: ends its request, if that is still alive."""
        if self.live.get(request_id) is mailbox:  # Not another, later request with the same id.
            self.finish(request_id, RequestCancelled(f"request {request_id}: its reader left before it was done"))

    def _expire(self, request: DiffusionRequest) -> None:
        late = f"timeout={request.timeout}: request {request.request_id} was not done in time"
        self.finish(request.request_id, DeadlineExceeded(late))

    def deliver(self, event: Event) -> None:
        """Puts an event of the scheduler's where its request's reader finds it."""
        mailbox = self.live.get(event.request_id)
        if mailbox is None:  # The engine is ending: everybody was told already.
            return
        if type(event) is StepEvent:
            mailbox.put(event)
            return
        if isinstance(event, Finished):
            self.live.borrowed[event.request_id].give_back(event.output)
        mailbox.put(event)
        if isinstance(event, Restarted):
            self.live.borrowed[event.request_id].rewind()
            self.observers.on_restarted(event.request_id, event.attempt)
        if mailbox.settled:
            self.live.leave(event.request_id)
            output = event.output if isinstance(event, Finished) else None
            error = event.error if isinstance(event, Failed) else None
            self.observers.on_end(event.request_id, output, error)

    def retire(self, heir: EngineCore) -> None:
        """Gives ``heir``, which serves, those that no worker has held; ends by itself once the rest is done."""
        waiting = [request_id for request_id in self.live if request_id not in self.residents]
        self.scheduler.finish_requests(waiting, RequestCancelled("another model takes it over"))
        for borrowed, mailbox, left_s in self.live.take(waiting):
            heir.inherit(borrowed, mailbox, left_s)
        self.lanes.kick()
        self._group.start_soon(self.guarded, self._end_when_done)

    async def _end_when_done(self) -> None:
        await self.operations.until(lambda: not (self.live or self._asked))
        self.stop()

    def inherit(self, borrowed: Borrowed, mailbox: Mailbox, left_s: float | None) -> None:
        """Takes over a request that was to expire in ``left_s``; one that does not fit this model fails, alone."""
        request = borrowed.request
        self.live.enter(borrowed, mailbox, left_s)
        try:
            assert self.info is not None
            validate(request, self.info, self.config)
            with self.clock.as_of(borrowed.accepted):
                self.scheduler.readmit(request)
        except RequestError as error:
            self.deliver(Failed(request_id=request.request_id, error=error))
        self.lanes.kick()

    @property
    def serves(self) -> bool:
        """Whether it has started, and neither ended nor failed."""
        return self.info is not None and self.failure is None and not (self._stopping or self.ended.is_set())

    def check_serving(self) -> None:
        """Raises:
        EngineNotRunning: Not started yet, or closed.
        EngineDead: A fault ended the engine; names it.
        """
        if self.failure is not None:
            raise EngineDead(f"the engine is dead, start a new one; it died of: {self.failure}")
        if self._stopping or self.ended.is_set():
            raise EngineNotRunning("the engine is closed; start it again, or make a new one")
        if self.info is None:
            raise EngineNotRunning("the engine is still starting; await start() first, or use `async with`")

    def check_started(self) -> None:
        """Raises:
        SteploomError: It was to start, and has not: the fault.
        """
        if self.failure is not None:
            raise fresh(self.failure)
        self.check_serving()

    async def idled(self) -> None:
        """Returns when no worker has anything to do, and all are there."""
        await self.lanes.idled()

    async def ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """The answer of the workers to ``call``.

        Raises:
            EngineError: The engine cannot serve, or has ended meanwhile; or the workers are being replaced.
        """
        self.check_serving()
        self.lanes.check()
        self._asked += 1
        try:
            return await self.while_alive(call)
        except SteploomError:
            await anyio.lowlevel.checkpoint()  # the engine hears of a worker's loss in the same turn as we
            raise
        finally:
            self._asked -= 1
            self.operations.changed()

    async def while_alive(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of ``call``, unless the engine ends before it is there.

        Raises:
            EngineError: The engine cannot serve, or has ended meanwhile.
        """
        self.check_serving()
        with anyio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                return await asked(call)
            finally:
                self._calls.discard(scope)
        self.check_serving()
        raise EngineNotRunning("the engine was closed before the call was answered")

    async def see_through(self, call: Callable[[], Awaitable[object]]) -> None:
        """Waits for the end of ``call``, which comes though the caller leaves; only with the engine it ends early.

        Raises:
            EngineError: The engine cannot serve, or has ended meanwhile.
        """
        self.check_serving()
        ended, errors = anyio.Event(), list[Exception]()

        async def run() -> None:
            await self.guarded(call, errors.append)
            ended.set()

        self._group.start_soon(run)
        await self.while_alive(ended.wait)
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Ends it: waiters get :class:`~steploom.errors.RequestCancelled`, then everything is unwound (``ended``)."""
        self._stopping = True
        self._end_all(RequestCancelled("the engine was closed before the request was done"))
        self._scope.cancel()

    async def guarded(
        self, part: Callable[[], Awaitable[object]], on_fault: Callable[[Exception], None] | None = None
    ) -> None:
        """Runs a part of the engine; its fault ends the engine, unless something else is done ``on_fault``.

        The boundary of the engine's own tasks: whatever they raise ends here.
        """
        try:
            await asked(part)
        except Exception as error:  # noqa: BLE001 - recorded: every waiter and every later call raises it
            (on_fault or self.die)(error)

    def die(self, error: Exception) -> None:
        """A fault ends the engine: all who wait for it are told, and all who will."""
        if self.failure is None:
            self.failure = self.operations.failure(self, error)
        self._end_all(self.failure)
        self._scope.cancel()

    def _end_all(self, error: SteploomError) -> None:
        for request_id, mailbox in list(self.live.items()):
            mailbox.fail(error)
            self.live.leave(request_id)
            self.observers.on_end(request_id, None, error)
        for scope in self._calls:
            scope.cancel()
