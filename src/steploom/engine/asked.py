"""asked, answered, called: other people's code, whose cancellations may be nobody's, and whose answers no answers."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any, TypeVar, cast

import anyio

from steploom.errors import raised

T = TypeVar("T")


async def asked(call: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What ``call`` answers. It is cancelled only if this task is.

    A future that a library has cancelled raises ``CancelledError`` in whoever awaits it. Nobody wants the task to end
    then, and task groups, which cannot tell, would end with it in silence; as they would with ``GeneratorExit``, and
    with a group of such; and the event loop, with all that it runs, with ``SystemExit``.

    Raises:
        RuntimeError: It raised ``CancelledError``, and nobody had cancelled this task; or something else that is no
            ``Exception``, and no signal's: that is meant for the process, and goes on.
    """
    task = asyncio.current_task()
    try:
        return await call(*args)
    except Exception:
        raise
    except asyncio.CancelledError as error:
        if _cancelled():
            raise
        said = f": {error}" if str(error) else ""
        raise RuntimeError(f"{_name(call)}() raised CancelledError{said}, though nobody had cancelled it") from error
    except BaseException as error:
        if is_signals(error) or not _runs(task):  # or it is being closed from outside, with the event loop
            raise
        raise RuntimeError(f"{_name(call)}() raised {raised(error)}") from error


def called(call: Callable[..., T], *args: Any) -> T:
    """What ``call`` returns, which nobody awaits.

    Raises:
        RuntimeError: It raised what is no ``Exception``, and no signal's.
    """
    try:
        return call(*args)
    except Exception:
        raise
    except BaseException as error:
        if is_signals(error):
            raise
        raise RuntimeError(f"{_name(call)}() raised {raised(error)}") from error


def is_signals(error: BaseException) -> bool:
    """Whether a signal's handler has raised this, in whatever the main thread was at: it is to end the process.

    So is every ``KeyboardInterrupt`` there. Anything else tells by its traceback: Python gives a handler the frame that
    it has interrupted, from which it looks called.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, KeyboardInterrupt):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(_holds(handler, interrupted) for interrupted, handler in itertools.pairwise(frames))


def _holds(frame: FrameType, other: FrameType) -> bool:
    """Whether ``other`` is among what ``frame`` was given."""
    values = list(frame.f_locals.values())
    many = [cast("tuple[object, ...]", value) for value in values if type(value) is tuple]  # ``*args``
    return any(value is other for value in itertools.chain(values, *many))


async def answered(kind: type[T], call: Callable[..., Awaitable[object]], *args: Any) -> T:
    """What ``call`` answers, as :func:`asked`, if it is of this kind.

    Raises:
        RuntimeError: It raised ``CancelledError``, and nobody had cancelled this task.
        TypeError: It answers something else.
    """
    answer = await asked(call, *args)
    if not isinstance(answer, kind):
        raise TypeError(f"{_name(call)}() returned {type(answer).__name__}: must be a {kind.__name__}")
    return answer


def _name(call: Callable[..., object]) -> str:
    """``Class.method``, where it is a method of an object."""
    while isinstance(call, partial):
        call = call.func
    whose, name = getattr(call, "__self__", None), getattr(call, "__name__", "a call")
    return name if whose is None else f"{type(whose).__name__}.{name}"


def _runs(task: asyncio.Task[Any] | None) -> bool:
    """Whether this is what the event loop is at."""
    try:
        return asyncio.current_task() is task
    except RuntimeError:  # there is none
        return False


def _cancelled() -> bool:
    """Whether somebody wants this task to end: by itself, or with a scope that it is in."""
    task = asyncio.current_task()
    return (task is not None and task.cancelling() > 0) or anyio.current_effective_deadline() == -math.inf
