"""Running a coroutine as the command line does: on uvloop where there is one, with a clean Ctrl-C."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import TypeVar, cast

T = TypeVar("T")


def run(main: Coroutine[object, object, T]) -> T:
    """Runs ``main`` to its end. Ctrl-C cancels it, waits until it has cleaned up, and raises KeyboardInterrupt.

    Where several tasks of ``main`` failed together, the first one's error is raised.
    """
    factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            return runner.run(main)
        except BaseExceptionGroup as group:
            raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in a group of groups."""
    first = group.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return _first(cast("BaseExceptionGroup[BaseException]", first))
    return first
