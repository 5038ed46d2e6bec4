"""What the library itself runs in threads, which never waits for a place that the application holds.

The pools of an event loop (anyio's default limiter, asyncio's default executor) are the application's. It may fill them
with whoever waits for the engine; what the engine has to do for them must then find a thread all the same.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 # pyright: ignore[reportUnusedImport] - not to be had once the main thread has ended
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")


async def at_once(call: Callable[..., T], *args: Any, abandon_on_cancel: bool = False) -> T:
    """``call(*args)`` in a thread that waits for no place: for what its owner does one at a time.

    Args:
        call: What blocks.
        args: For it.
        abandon_on_cancel: Whether who is cancelled leaves the thread to itself, instead of waiting for its end.
    """
    return await to_thread.run_sync(call, *args, abandon_on_cancel=abandon_on_cancel, limiter=CapacityLimiter(1))


class Threads:
    """Places for what requests cause, so many in each event loop; nobody else takes one.

    Args:
        name: What for.
        places: How many calls run side by side.
    """

    def __init__(self, name: str, places: int) -> None:
        self._places = places
        self._limiter: RunVar[CapacityLimiter] = RunVar(f"steploom {name}")

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """``call(*args)`` in a thread, when there is a place."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._places)
            self._limiter.set(limiter)
        return await to_thread.run_sync(call, *args, limiter=limiter)


class OneThread:
    """A thread that runs calls one at a time, in order; it begins with the first of them.

    The pools of :mod:`concurrent.futures` take no work any more once the main thread has ended, though other threads of
    an application go on, and wait for the engine.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], None]) -> None:
        """Has ``call``, which raises nothing, run after those before it.

        Raises:
            RuntimeError: The system has no thread left, and this one has not begun.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # what it holds may be large

    def end(self, *, wait: bool) -> None:
        """The thread ends when all calls were run; with ``wait`` that is awaited here."""
        self._calls.put(None)
        if wait and self._thread is not None:
            self._thread.join()


PICTURES = Threads("pictures", 8)
"""Reads the pictures of requests. Of these some are the application's own objects, which may take their time."""
BUFFERS = Threads("buffers", 2)
"""Copies large arguments; more at a time would only share the memory's speed."""
SERVING = Threads("serving", 16)
"""Reads what comes over HTTP, and writes the answers."""
