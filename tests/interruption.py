"""Cancels a coroutine at each of its awaits.

:func:`interrupted` drives a coroutine and cancels it when it is suspended for the n-th time, for n = 0, 1, 2... until
it gets through. Three ways to be cancelled: by its task while it waits, by its task when what it waited for is there
already, and by a cancel scope around it.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Literal

import anyio

How = Literal["task", "late", "scope"]
HOWS: tuple[How, ...] = ("task", "late", "scope")


@types.coroutine
def _counted(main: Coroutine[Any, Any, Any], n: int, cancel: Callable[[Any], None]) -> Generator[Any, Any, Any]:
    """Runs ``main``, calling ``cancel`` at its n-th suspension with what it is suspended on."""
    resume: Callable[[], Any] = lambda: main.send(None)  # noqa: E731
    count = 0
    while True:
        try:
            waited_for = resume()
        except StopIteration as end:
            return end.value
        if count == n:
            cancel(waited_for)
        count += 1
        try:
            yield waited_for
        except BaseException as error:  # noqa: BLE001 - handed on
            resume = lambda error=error: main.throw(error)  # noqa: E731
        else:
            resume = lambda: main.send(None)  # noqa: E731


async def interrupted(main: Coroutine[Any, Any, Any], n: int, how: How) -> bool:
    """Whether ``main`` came to its n-th suspension, and was cancelled there."""
    reached = False
    scope = anyio.CancelScope()

    def cancel(waited_for: Any) -> None:
        nonlocal reached
        reached = True
        if how == "scope":
            scope.cancel()
        elif how == "late" and isinstance(waited_for, asyncio.Future):
            waited_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()

    async def body() -> None:
        with scope:
            await _counted(main, n, cancel)

    task = asyncio.get_running_loop().create_task(body())
    await asyncio.wait([task])
    if task.cancelled():
        assert reached
    else:
        task.result()
    return reached


async def at_every_await(make: Callable[[], Coroutine[Any, Any, Any]], after: Callable[[], Awaitable[None]]) -> int:
    """Interrupts ``make()`` at each of its awaits, in each way; ``after`` checks. Returns how many awaits there are."""
    count = 0
    for how in HOWS:
        n = 0
        while await interrupted(make(), n, how):
            await after()
            n += 1
            assert n < 1000
        await after()
        count = max(count, n)
    return count
