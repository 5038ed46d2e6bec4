"""What the library itself runs in threads, which never waits for a place that the application holds.

The pools of an event loop (anyio's default limiter, asyncio's default executor) are the application's. It may fill them
with whoever waits for the engine; what the engine has to do for them must then find a thread all the same.
"""

from __future__ import annotations

from collections.abc import Callable
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


PICTURES = Threads("pictures", 8)
"""Reads the pictures of requests. Of these some are the application's own objects, which may take their time."""
BUFFERS = Threads("buffers", 2)
"""Copies large arguments; more at a time would only share the memory's speed."""
SERVING = Threads("serving", 16)
"""Reads what comes over HTTP, and writes the answers."""
