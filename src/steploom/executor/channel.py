"""Commands to one worker and the futures of their answers; the executors that are made of such channels."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import anyio

from steploom.config import EngineConfig
from steploom.config.values import is_seconds
from steploom.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    EngineNotRunning,
    InvalidRequest,
    ProtocolError,
    SteploomError,
    TickTimeout,
)
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.protocol import PROTOCOL_VERSION, ErrorInfo, PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.worker.messages import (
    Amend,
    Answer,
    Call,
    Command,
    Configure,
    Fatal,
    Hello,
    Progress,
    Ready,
    Returned,
    Tick,
    Ticked,
    Withdraw,
)

MAX_TICKS = 2
"""Ticks in flight; a third waits."""
MAX_CALLS = 64
"""Calls in flight; a 65th waits."""

logger = logging.getLogger("steploom.worker")


class Channel:
    """One worker as the event loop sees it. Everything runs in the loop that made it.

    Args:
        rank: Which worker.
        config: The engine's settings.
        send: Hands a command to the worker, without waiting.
        device: The number of its device among those that it sees; None: its rank.

    Attributes:
        ready: The worker's :class:`Ready`, or why there is none.
        loaded: Whether it has said so.
        failed: Set when the worker cannot go on.
        failure: Makes the error that says why; each waiter raises one of its own.
        slots: Places for ticks in flight.
    """

    def __init__(
        self, rank: int, config: EngineConfig, send: Callable[[Command], None], device: int | None = None
    ) -> None:
        self.rank = rank
        self._device = rank if device is None else device
        self.on_progress: ProgressCallback = logger.info
        self.loaded = False
        self.failed = anyio.Event()
        self.failure: Callable[[], SteploomError] | None = None
        self._config = config
        self._send = send
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self._ticks: deque[tuple[int, asyncio.Future[RunnerOutput]]] = deque()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._before: set[int] = set()  # calls that are answered before the first of the ticks begins
        self._last_call = 0
        self._clock: asyncio.TimerHandle | None = None
        self.slots = anyio.Semaphore(MAX_TICKS, fast_acquire=True)

    def tick(self, output: SchedulerOutput) -> asyncio.Future[RunnerOutput]:
        """Sends a tick; the future of its answer."""
        self._check()
        self._send(Tick(output))
        future: asyncio.Future[RunnerOutput] = self._loop.create_future()
        self._ticks.append((output.tick, future))
        if len(self._ticks) == 1:
            self._next_tick()
        return future

    def amend(self, output: SchedulerOutput) -> None:
        """Sends what is added to a tick."""
        self._check()
        self._send(Amend(output))

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, asyncio.Future[Any]]:
        """Sends a call; its number and the future of its answer."""
        self._check()
        self._last_call += 1
        self._send(Call(self._last_call, method, list(args), dict(kwargs)))
        future = self._calls[self._last_call] = self._loop.create_future()
        return self._last_call, future

    def withdraw(self, call: int) -> None:
        """Nobody waits for ``call`` any more; does nothing if it was answered."""
        if self._calls.pop(call, None) is not None and self.failure is None:
            self._send(Withdraw(call))
            if self._before:
                self._before.discard(call)
                self._wind(self._config.tick_timeout_s)

    def receive(self, answer: Answer) -> None:
        """Takes what the worker says."""
        if self.failure is not None:
            return
        match answer:
            case Ticked():
                self._ticked(answer)
            case Returned():
                future = self._calls.pop(answer.call, None)
                self._next_tick()
                if future is not None:
                    _settle(future, answer.result, answer.error, lambda info: info.exception())
            case Progress():
                self._progress(answer.line)
            case Ready():
                self.loaded = True
                if not self.ready.done():
                    self.ready.set_result(answer)
            case Hello():
                self._greet(answer)
            case Fatal():
                what = "" if self.loaded else f"model={self._config.model!r} could not be loaded: "
                self.fail(lambda: _engine_error(answer.error, what))

    def _greet(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            message = f"worker {self.rank} speaks protocol version {hello.version}, this engine {PROTOCOL_VERSION}"
            self.fail(lambda: ProtocolError(message))
        else:
            self._send(Configure.of(self._config, self._device))

    def _ticked(self, answer: Ticked) -> None:
        if not self._ticks or self._ticks[0][0] != answer.tick:
            message = f"worker {self.rank} answered tick {answer.tick}, which is not its turn"
            self.fail(lambda: ProtocolError(message))
            return
        _, future = self._ticks.popleft()
        self._next_tick()
        _settle(future, answer.output, answer.error, _engine_error)

    def _progress(self, line: str) -> None:
        """Loading, or warming up within a tick: then only ``start_timeout_s`` bounds it, as it does loading."""
        self.on_progress(line)
        self._wind(self._config.start_timeout_s)

    def _next_tick(self) -> None:
        """The first of the ticks begins once the worker has answered what it was asked until now."""
        self._before = set(self._calls)
        self._wind(self._config.tick_timeout_s)

    def _wind(self, seconds: float) -> None:
        """Starts the clock of the tick that the worker executes now, if there is one."""
        if self._clock is not None:
            self._clock.cancel()
        runs = self._ticks and not self._before
        self._clock = self._loop.call_later(seconds, self._late, seconds) if runs else None

    def _late(self, seconds: float) -> None:
        tick, future = self._ticks[0]
        if not future.done():
            future.set_exception(TickTimeout(f"worker {self.rank} did not answer tick {tick} within {seconds} s"))

    def fail(self, failure: Callable[[], SteploomError]) -> None:
        """The worker cannot go on: all who wait for it are told, and all who will. The first call counts."""
        if self.failure is not None:
            return
        self.failure = failure
        futures = [self.ready, *(future for _, future in self._ticks), *self._calls.values()]
        self._ticks.clear()
        self._wind(0)
        self._calls.clear()
        for future in futures:
            if not future.done():
                future.set_exception(failure())
        if self.ready.done() and not self.ready.cancelled():
            self.ready.exception()  # nobody may wait for it any more, where a start was cancelled early
        self.failed.set()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure()


class ChannelExecutor(DiffusionExecutor):
    """An executor that speaks to its workers over channels; subclasses fill ``_channels`` and close them."""

    ticks_in_flight = MAX_TICKS

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._channels: list[Channel] = []
        self._call_slots = anyio.Semaphore(MAX_CALLS, fast_acquire=True)

    async def start(self, on_progress: ProgressCallback | None = None) -> PipelineInfo:
        """Starts; see :meth:`DiffusionExecutor.start`."""
        try:
            with anyio.fail_after(self.config.start_timeout_s):
                return await super().start(on_progress)
        except TimeoutError:
            await self.shutdown()
            raise EngineDead(
                f"start_timeout_s={self.config.start_timeout_s}: model={self.config.model!r} was not loaded in time"
            ) from None
        except BaseException:
            await self.shutdown()  # shields itself: also when it is a cancellation that ends the start
            raise

    async def _ready(self, on_progress: ProgressCallback) -> list[Ready]:
        """What the workers say when they have loaded."""
        for channel in self._channels:
            channel.on_progress = on_progress
        ready = [channel.ready for channel in self._channels]
        done, _ = await asyncio.wait(ready, return_when=asyncio.FIRST_EXCEPTION)  # all load at a time; one may fail
        for future in done:
            future.result()
        for channel in self._channels:
            channel.on_progress = logger.info
        return [future.result() for future in ready]

    def _running(self) -> list[Channel]:
        if not self._channels:
            raise EngineNotRunning("the executor was not started, or is closed")
        return self._channels

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        """Executes one tick; see :meth:`DiffusionExecutor.execute_step`."""
        channel = self._running()[output.worker]
        async with channel.slots:
            return await channel.tick(output)

    def amend(self, output: SchedulerOutput) -> None:
        """Adds to a tick that is in flight; see :meth:`DiffusionExecutor.amend`."""
        self._running()[output.worker].amend(output)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Calls a method of every worker; see :meth:`DiffusionExecutor.collective_rpc`."""
        channels = self._running()
        _check_waiting(timeout, unique_reply_rank, len(channels))
        results = await self._call(channels, method, timeout, args, kwargs)
        return results if unique_reply_rank is None else results[unique_reply_rank]

    async def _call(
        self,
        channels: list[Channel],
        method: str,
        timeout: float | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
    ) -> list[Any]:
        """Calls a method of these workers."""
        _check_call(method, args, kwargs)
        with anyio.fail_after(timeout):
            async with self._call_slots:
                calls = [(channel, *channel.call(method, args, kwargs or {})) for channel in channels]
                try:
                    return [await future for _, _, future in calls]
                finally:
                    for channel, number, future in calls:
                        channel.withdraw(number)
                        if future.done() and not future.cancelled():
                            future.exception()  # nobody asks for it where that of another worker is raised

    async def sleep(self, level: int = 1, worker: int | None = None) -> None:
        """Frees the devices, or one of them; see :meth:`DiffusionExecutor.sleep`."""
        channels = self._running()
        await self._call(channels if worker is None else [channels[worker]], "sleep", None, (level,), None)

    async def wait_failed(self, worker: int = 0) -> EngineError:
        """Returns why the worker has failed; see :meth:`DiffusionExecutor.wait_failed`."""
        channel = self._running()[worker]
        await channel.failed.wait()
        assert channel.failure is not None
        error = channel.failure()
        return error if isinstance(error, EngineError) else EngineDead(str(error))


def _check_call(method: object, args: object, kwargs: object) -> None:
    """Refuses here what the worker could not read: a message that does not decode ends it.

    Raises:
        InvalidRequest: Names the argument.
    """
    if not isinstance(method, str):
        raise InvalidRequest(f"method={method!r}: must be a str, the name of a method", field="method")
    if not isinstance(args, Sequence) or isinstance(args, str | bytes | bytearray):
        raise InvalidRequest(f"args={args!r}: must be a list or tuple of positional arguments", field="args")
    named = isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in cast("Mapping[object, Any]", kwargs))
    if kwargs is not None and not named:
        raise InvalidRequest(f"kwargs={kwargs!r}: must be a mapping of names to arguments", field="kwargs")


def _check_waiting(timeout: object, rank: object, workers: int) -> None:
    """Refuses what is no time to wait, and no worker to wait for.

    Raises:
        InvalidRequest: Names the argument.
    """
    if timeout is not None and not is_seconds(timeout):
        raise InvalidRequest(f"timeout={timeout!r}: must be a number of seconds, or None", field="timeout")
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < workers):
        there = "is one worker, rank 0" if workers == 1 else f"are {workers} workers, from rank 0"
        raise InvalidRequest(f"unique_reply_rank={rank!r}: there {there}", field="unique_reply_rank")


def _settle(
    future: asyncio.Future[Any], result: Any, error: ErrorInfo | None, raised: Callable[[ErrorInfo], Exception]
) -> None:
    """Ends ``future``, unless its waiter has left."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(raised(error))


def _engine_error(info: ErrorInfo, what: str = "") -> SteploomError:
    """What the runner as a whole failed with: never the fault of one request."""
    error = info.exception()
    if isinstance(error, EngineError | ConfigError):
        return error
    dead = EngineDead(what + info.message)
    if info.traceback:
        dead.add_note(info.traceback)
    return dead
