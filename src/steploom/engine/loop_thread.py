"""The event loop that a blocking engine runs in, in a thread of its own, and the end of both."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import anyio
import anyio.lowlevel
from anyio.from_thread import BlockingPortal

from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.errors import EngineError, EngineNotRunning

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own.

    Not ``start_blocking_portal``: its thread is waited for when the interpreter ends, before any clean-up may run, so
    that a script that forgot ``close()`` would hang. This one is a daemon.

    Raises:
        OSError: The system has no event loop for it (no file descriptors are left); or whatever else prevents one.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._stopped = False
        self._last: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint
        portal: Future[BlockingPortal] = Future()
        self._thread = threading.Thread(target=self._run, args=(portal,), name="steploom loop", daemon=True)
        self._thread.start()
        self._portal = portal.result()

    def _run(self, ready: Future[BlockingPortal]) -> None:
        """The thread: a loop that cannot be made is the failure of whoever waits for it, and no one else's."""
        try:
            anyio.run(self._serve, ready)
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _serve(self, ready: Future[BlockingPortal]) -> None:
        self._loop, self._leaving = asyncio.get_running_loop(), anyio.Event()
        async with BlockingPortal() as portal:
            ready.set_result(portal)
            await self._leaving.wait()
            try:
                await self._last()
            finally:
                self._stopped = True
                await portal.stop(cancel_remaining=True)

    @property
    def here(self) -> bool:
        """Whether it is a thread of this process, and not of one of which this is a fork."""
        return os.getpid() == self._process

    @property
    def current(self) -> bool:
        """Whether it is this thread."""
        return threading.get_ident() == self._thread.ident

    def _check(self) -> None:
        if not self.here:
            raise EngineNotRunning(
                f"the engine belongs to process {self._process}, of which this one ({os.getpid()}) is a fork "
                "without its threads: make an engine here, too, or ask that process"
            )
        if self.current:
            raise EngineError(
                "this is the engine's own event loop, which a blocking call would hold up: call it in another thread"
            )

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs ``function`` in the loop; an exception while waiting for it (Ctrl-C) cancels it first.

        Raises:
            EngineNotRunning: The loop has ended, or is another process's.
            EngineError: This is the loop's own thread.
        """
        self._check()
        tasks: list[asyncio.Task[Any]] = []
        exits: list[BaseException] = []
        done = threading.Event()

        async def run() -> T | None:
            tasks.append(cast("asyncio.Task[Any]", asyncio.current_task()))
            try:
                return await function()
            except (SystemExit, KeyboardInterrupt) as error:  # would end the loop, and everybody's calls with it
                exits.append(error)
            finally:
                done.set()

        async def cancel() -> bool:
            await anyio.lowlevel.checkpoint()  # Whatever was started before this has begun by now.
            return any(task.cancel() for task in tasks)

        future: Future[T | None] | None = None
        try:
            future = self._portal.start_task_soon(run)
            # A plain lock: a Condition, as result() has one, was seen to hang after a signal handler had raised in it.
            over = threading.Lock()
            over.acquire()
            future.add_done_callback(lambda _: over.release())
            over.acquire()
            answer = future.result()
            for exit_ in exits:
                raise exit_
            return cast("T", answer)
        except BaseException as error:  # Also one of a signal handler, which may come before there is a future.
            if future is None and isinstance(error, RuntimeError) and self._over:
                raise EngineNotRunning("the engine is closed: make a new one") from None
            if (future is None or not future.done()) and self._portal.call(cancel):
                done.wait()  # The call was cancelled, and has ended before we go on.
            raise

    @property
    def _over(self) -> bool:
        """Whether it takes no calls any more."""
        return self._stopped or not self._thread.is_alive()

    def leave(self, last: Callable[[], Awaitable[object]]) -> None:
        """Has the loop end itself after ``last``. Takes no lock and waits for nobody: it may be called anywhere."""
        self._last = last
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._leaving.set)

    def stop(self) -> None:
        """Ends the loop and its thread."""
        self._stopped = True
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._portal.call(self._portal.stop, True)
        self.join()

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()


class Ending:
    """The end of an engine and of its loop's thread: once, and in the process that made them.

    It holds no reference to the facade, which may be gone already.
    """

    def __init__(self, engine: AsyncDiffusionEngine, thread: LoopThread) -> None:
        self._engine = engine
        self._thread = thread
        self._begun = False
        _unended.add(self)

    def now(self) -> None:
        """Ends both, and returns when nothing is left of them; in the loop's own thread it is :meth:`soon`."""
        if self._thread.here and self._thread.current:
            self.soon()
        elif self._begin():
            try:
                self._thread.call(self._engine.close)
            finally:
                self._thread.stop()
                _unended.discard(self)

    def soon(self) -> None:
        """Has the loop do it: whoever collects garbage may be that loop, or another one, which nothing may hold up."""
        if self._begin():
            self._thread.leave(self._last)

    async def _last(self) -> None:
        try:
            await self._engine.close()
        finally:
            _unended.discard(self)

    def _begin(self) -> bool:
        begun, self._begun = self._begun, True
        return not begun and self._thread.here

    def at_exit(self) -> None:
        """Returns when nothing is left, whoever has begun with it."""
        if self._thread.here:
            self.now()
            self._thread.join()


_unended: set[Ending] = set()
"""Of engines that were not closed yet."""


@atexit.register
def _end_all() -> None:
    for ending in list(_unended):
        ending.at_exit()
