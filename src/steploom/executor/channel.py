"""Commands to one worker, the futures of their answers, and the clock of what it does."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import anyio

from steploom.config import EngineConfig
from steploom.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    ProtocolError,
    SteploomError,
    TickTimeout,
)
from steploom.executor.abstract import ProgressCallback
from steploom.executor.lengths import is_short
from steploom.protocol import PROTOCOL_VERSION, ErrorInfo, RunnerOutput, SchedulerOutput
from steploom.threads import at_once
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
    Written,
)

MAX_TICKS = 2
"""Ticks in flight; a third waits."""

LATE_S = 0.5
"""A loop that comes so much later to a timer than it was due has not looked at its sockets either."""

logger = logging.getLogger("steploom.worker")


class Asked(NamedTuple):
    """A call that was not answered yet."""

    method: str
    limit_s: float | None
    """Seconds that it may take from when its turn comes; None: whoever asks bounds it, and withdraws it then."""
    answer: asyncio.Future[Any]


class Prepared(NamedTuple):
    """A call, and what is to be sent of it."""

    call: Call
    message: Call | Written


class Channel:
    """One worker as the event loop sees it. Everything runs in the loop that made it.

    What the worker does now, a call or a tick, has a clock, which begins when what was before it was answered or given
    up. When it has run down the worker is lost.

    Args:
        rank: Which worker.
        config: The engine's settings.
        send: Hands a command to the worker, or what ``write`` has made of it, without waiting.
        device: The number of its device among those that it sees; None: its rank.
        unready: What it means, for messages, if the worker fails before it is ready.

    Attributes:
        ready: The worker's :class:`Ready`, or why there is none.
        loaded: Whether it has said so.
        failed: Set when the worker cannot go on.
        failure: Makes the error that says why; each waiter raises one of its own.
        slots: Places for ticks in flight.
        write: Writes a command, for whom that is worth doing beforehand; may be called in a thread.
    """

    def __init__(
        self,
        rank: int,
        config: EngineConfig,
        send: Callable[[Any], None],
        device: int | None = None,
        unready: str | None = None,
    ) -> None:
        self.rank = rank
        self._unready = unready or f"model={config.model!r} could not be loaded"
        self._device = rank if device is None else device
        self.on_progress: ProgressCallback = logger.info
        self.loaded = False
        self.failed = anyio.Event()
        self.failure: Callable[[], SteploomError] | None = None
        self._config = config
        self._send = send
        self.write: Callable[[Command], Written] | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self._ticks: deque[tuple[int, asyncio.Future[RunnerOutput]]] = deque()
        self._calls: dict[int, Asked] = {}
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
            self._before = set(self._calls)
            if not self._before:
                self._wind()
        return future

    def amend(self, output: SchedulerOutput) -> None:
        """Sends what is added to a tick."""
        self._check()
        self._send(Amend(output))

    async def prepared(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Prepared:
        """A call that can be sent at once: one with long arguments is written, in a thread."""
        self._check()
        self._last_call += 1
        call = Call(self._last_call, method, list(args), dict(kwargs))
        if self.write is None or is_short([call.args, call.kwargs]):
            return Prepared(call, call)
        return Prepared(call, await at_once(self.write, call, abandon_on_cancel=True))

    def call(self, prepared: Prepared, limit_s: float | None) -> tuple[int, asyncio.Future[Any]]:
        """Sends a call, which may take ``limit_s`` (see :class:`Asked`); its number and the future of its answer."""
        self._check()
        call = prepared.call
        self._send(prepared.message)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[call.call] = Asked(call.method, limit_s, future)
        if len(self._calls) == 1 and not self._ticks:
            self._wind()
        return call.call, future

    def withdraw(self, call: int) -> None:
        """Nobody waits for ``call`` any more; does nothing if it was answered."""
        if call not in self._calls or self.failure is not None:
            return
        was_now = not self._ticking and next(iter(self._calls)) == call
        del self._calls[call]
        self._before.discard(call)
        self._send(Withdraw(call))
        if was_now:
            self._wind()

    def receive(self, answer: Answer) -> None:
        """Takes what the worker says."""
        if self.failure is not None:
            return
        match answer:
            case Ticked():
                self._ticked(answer)
            case Returned():
                asked = self._calls.pop(answer.call, None)
                self._next()
                if asked is not None:
                    _settle(asked.answer, answer.result, answer.error, lambda info: info.exception())
            case Progress():
                self._progress(answer.line)
            case Ready():
                self.loaded = True
                if not self.ready.done():
                    self.ready.set_result(answer)
            case Hello():
                self._greet(answer)
            case Fatal():
                what = "" if self.loaded else f"{self._unready}: "
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
        if (answer.output is None) == (answer.error is None):
            message = (
                f"worker {self.rank} answered tick {answer.tick} with neither an output nor an error, or with both"
            )
            self.fail(lambda: ProtocolError(message))
            return
        _, future = self._ticks.popleft()
        self._next()
        _settle(future, answer.output, answer.error, _engine_error)

    def _progress(self, line: str) -> None:
        """Loading, or warming up: then ``start_timeout_s`` bounds a tick, as it does loading, and at least a call."""
        self.on_progress(line)
        self._wind(self._config.start_timeout_s)

    def _next(self) -> None:
        """The worker goes on, with the first of the ticks once it has answered the calls that were sent until now."""
        self._before = set(self._calls)
        self._wind()

    @property
    def _ticking(self) -> bool:
        """Whether what the worker does now is a tick."""
        return bool(self._ticks) and not self._before

    def _wind(self, start_s: float = 0.0) -> None:
        """Starts the clock of what the worker does now, if it does anything; it warms up if ``start_s`` are given."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        seconds, what = None, ""
        if self._ticking:
            seconds, what = start_s or self._config.tick_timeout_s, f"tick {self._ticks[0][0]}"
        elif self._calls:
            method, seconds, _ = next(iter(self._calls.values()))
            what = f"{method}()"
            if seconds is not None:  # the call may have crossed with the answer before it, and wait for the tick
                seconds = max(seconds, start_s, self._config.tick_timeout_s if self._ticks else 0.0)
        if seconds is not None:
            error = partial(TickTimeout, f"worker {self.rank} did not answer {what} within {seconds} s")
            self._clock = self._loop.call_later(seconds, self._run_down, seconds, error)

    def _run_down(self, seconds: float, error: Callable[[], SteploomError]) -> None:
        """The clock has run down: the worker is lost, unless it was this process that stood still meanwhile.

        A loop that was blocked or stopped (Ctrl-Z, a debugger) may not have read the answer yet: it has its time anew.
        """
        assert self._clock is not None
        if self._loop.time() - self._clock.when() < LATE_S:
            self.fail(error)
        else:
            self._clock = self._loop.call_later(seconds, self._run_down, seconds, error)

    def fail(self, failure: Callable[[], SteploomError]) -> None:
        """The worker cannot go on: all who wait for it are told, and all who will. The first call counts."""
        if self.failure is not None:
            return
        self.failure = failure
        futures = [
            self.ready,
            *(future for _, future in self._ticks),
            *(asked.answer for asked in self._calls.values()),
        ]
        self._ticks.clear()
        self._calls.clear()
        self._wind()
        for future in futures:
            if not future.done():
                future.set_exception(failure())
        if self.ready.done() and not self.ready.cancelled():
            self.ready.exception()  # nobody may wait for it any more, where a start was cancelled early
        self.failed.set()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure()


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
    """What the runner as a whole failed with: never the fault of one request.

    It is the settings' only while it loads, as ``what`` says then: one that has served is replaced.
    """
    error = info.exception()
    if isinstance(error, EngineError) or (what and isinstance(error, ConfigError)):
        return error
    dead = EngineDead(what + info.message)
    if info.traceback:
        dead.add_note(info.traceback)
    return dead
