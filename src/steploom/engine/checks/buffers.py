"""Buffers that the application gave: what can be written into is copied, since it may be used again meanwhile.

A request waits, runs, and begins again where its worker is lost; each time it is what it was when it was accepted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from steploom.errors import raised
from steploom.media.pictures import DEEPEST, is_image, is_tensor, shape_of
from steploom.requests import DiffusionRequest
from steploom.threads import BUFFERS

log = logging.getLogger(__name__)

LARGE = 1 << 20
"""Bytes that are sooner copied than handed to a thread."""


async def kept(request: DiffusionRequest) -> DiffusionRequest:
    """``request`` with copies of all that can be written into, large ones made in a thread.

    Generators stay: :class:`~steploom.engine.checks.generators.Borrowed` has its own of them.

    Args:
        request: Its arguments were checked; none is nested without end.
    """
    copy = partial(request.mapped, partial(_copied, made={}))
    if sum(map(_bytes, _buffers(dict(request.params)))) <= LARGE:
        return copy()
    return await BUFFERS.run(copy)


def _buffers(value: Any, depth: int = 0) -> Iterator[Any]:
    """What holds bytes in it."""
    if depth > DEEPEST:
        return
    if _is_record(value):
        value = [getattr(value, field.name) for field in _fields(value)]
    if isinstance(value, (list, tuple, dict)):
        held = cast("Any", value)
        for item in held.values() if isinstance(value, dict) else held:
            yield from _buffers(item, depth + 1)
    elif _is_buffer(value):
        yield value


def _copied(value: Any, made: dict[int, tuple[Any, Any]], depth: int = 0) -> Any:
    """A copy of ``value``, in which the same object is one object again.

    Args:
        value: Anything.
        made: Copies by id, with what they are copies of, so that it stays alive.
        depth: How deep it stands.
    """
    known = made.get(id(value))
    if known is not None or depth > DEEPEST:
        return value if known is None else known[1]
    try:
        copy = _copy(value, partial(_copied, made=made, depth=depth + 1))
    except Exception as fault:  # noqa: BLE001 - of the caller's classes: what cannot travel is refused by name later
        log.warning("a %s stays the caller's own: it cannot be copied (%s)", type(value).__name__, raised(fault))
        copy = value
    made[id(value)] = (value, copy)
    return copy


def _copy(value: Any, inner: Callable[[Any], Any]) -> Any:
    if _is_record(value):
        return dataclasses.replace(value, **{field.name: inner(getattr(value, field.name)) for field in _fields(value)})
    if isinstance(value, dict):  # one of another class travels as a dict
        return {key: inner(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list) or type(value) is tuple:
        items = [inner(item) for item in cast("list[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    if not _is_buffer(value):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(cast("bytearray", value))
    return value.detach().clone() if is_tensor(value) else value.copy()


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(record: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(record) if field.init and hasattr(record, field.name)]


def _is_buffer(value: Any) -> bool:
    if isinstance(value, (bytearray, memoryview)) or is_image(value):
        return True
    return shape_of(value) is not None and (is_tensor(value) or hasattr(value, "copy"))


def _bytes(value: Any) -> int:
    if is_image(value):
        return value.size[0] * value.size[1] * 4
    return len(value) if isinstance(value, bytearray) else int(getattr(value, "nbytes", 0))
