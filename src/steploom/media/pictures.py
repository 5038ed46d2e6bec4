"""What a picture is: PIL images, arrays and tensors are told apart here, and no library of theirs is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, cast

from steploom.errors import InvalidRequest

DEEPEST = 8
"""Lists within lists: batches of videos, or of examples of pictures, have three levels."""
_SHOWN = 3


def leaves(name: str, value: Any, depth: int = 0) -> Iterator[Any]:
    """What lists, tuples and dicts hold; ``value`` itself if it is none.

    Raises:
        InvalidRequest: They are nested too deep, or hold themselves.
    """
    if depth > DEEPEST:
        raise InvalidRequest(f"{name}: lists nested more than {DEEPEST} deep; give one list", field=name)
    if isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from leaves(name, item, depth + 1)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from leaves(name, item, depth + 1)
    else:
        yield value


def is_image(value: Any) -> bool:
    """Whether ``value`` is a PIL image; this process may have no PIL."""
    return isinstance(getattr(value, "size", None), tuple) and hasattr(value, "mode") and hasattr(value, "convert")


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array or a tensor; None of anything else."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "dtype") or isinstance(value, type):
        return None
    sides = cast("tuple[Any, ...]", shape)
    return tuple(map(int, sides)) if all(hasattr(side, "__index__") for side in sides) else None


def kind_of(value: Any) -> str:
    """The name of an array's or tensor's dtype; empty for anything else."""
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def size_of(value: Any) -> tuple[int, int] | None:
    """Width and height of a PIL image, of an array with its channels last, or of a tensor with its channels first.

    Of an array whose last dimension is none of channels, the larger of what it may mean. None of anything else.
    """
    if is_image(value):
        return value.size
    shape = shape_of(value) or ()
    if len(shape) < 2:
        return None
    first, last = (shape[-1], shape[-2]), (shape[-2], shape[-3]) if len(shape) > 2 else (0, 0)
    if is_tensor(value) or len(shape) == 2:
        return first
    return last if shape[-1] <= 4 else max(first, last, key=lambda size: size[0] * size[1])


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor; this process may have no torch."""
    return hasattr(value, "is_cuda")


def brief(value: Any) -> str:
    """What a message says of a value."""
    shape = shape_of(value)
    if shape is not None:
        return f"<{type(value).__name__} {list(shape)} {kind_of(value):.40}>"
    if is_image(value):
        return f"<{value.mode} image of {value.size[0]}x{value.size[1]}>"
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if isinstance(value, (list, tuple)):
        every = cast("list[Any]", value)
        return f"[{', '.join(map(brief, every[:_SHOWN]))}{', ...' if len(every) > _SHOWN else ''}]"
    return f"{value!r:.80}" if isinstance(value, (str, Path, int, float, NoneType)) else f"<{type(value).__name__}>"
