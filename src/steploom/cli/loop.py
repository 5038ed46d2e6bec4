"""Running a coroutine as the command line does: on uvloop where there is one, with a clean Ctrl-C."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    uvloop: Any = importlib.import_module("uvloop")
    return uvloop.new_event_loop


_FACTORY = _loop_factory()

# Imported here and not by the coroutines that use them: Ctrl-C ends an import at once where no event loop runs, and
# would wait for the next await in one.
for _name in ("anyio", "rich.console", "rich.progress", "steploom.engine.async_engine"):
    importlib.import_module(_name)


def run(main: Coroutine[object, object, T]) -> T:
    """Runs ``main`` to its end. Ctrl-C cancels it, waits until it has cleaned up, and raises KeyboardInterrupt.

    Where several tasks of ``main`` failed together, the first one's error is raised.
    """
    try:
        with asyncio.Runner(loop_factory=_FACTORY) as runner:
            return runner.run(main)
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        main.close()  # interrupted before it began, it would be complained about


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in a group of groups."""
    first = group.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return _first(cast("BaseExceptionGroup[BaseException]", first))
    return first
