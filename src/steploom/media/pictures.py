"""What a picture is: PIL images, arrays and tensors are told apart here, and no library of theirs is imported."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from numbers import Number
from pathlib import Path
from types import NoneType
from typing import Any, cast

from steploom.errors import InvalidRequest

DEEPEST = 8
"""Lists within lists: batches of videos, or of examples of pictures, have three levels."""
_SHOWN, _SHOWN_DEEP, _SHOWN_LONG = 3, 3, 80
"""Of a value in a message: items of a list, lists within lists, characters."""

_SPREAD = "255 * (numpy.asarray(image) - low) / (high - low)"
"""To what a pixel becomes whose least and largest values only the caller knows."""


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


def lost_in_8_bits(image: Any, *, mask: bool = False) -> str | None:
    """How to convert a PIL image of 16 or 32 bits a pixel, where ``convert("RGB")`` would cut its values off at 255.

    Args:
        image: A PIL image; of one that stands in a file the pixels are read.
        mask: Whether black and white is wanted, not RGB.

    Returns:
        Python code; None where ``convert`` keeps what there is.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    low, top = image.getextrema()
    fraction = image.mode == "F" and 0 < top <= 1
    if low >= 0 and top <= 255 and not fraction:
        return None
    whole = low >= 0 and top < 2**16 and image.mode != "F"
    values = "numpy.asarray(image)"
    scaled = f"{values} // 257" if whole else f"255 * {values}" if fraction and low >= 0 else _SPREAD
    return f"Image.fromarray(({scaled}).astype('uint8'))" + ("" if mask else ".convert('RGB')")


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


def brief(value: Any, depth: int = 0) -> str:
    """What a message says of a value: short, and never an error of the value's own ``__repr__``."""
    shape = shape_of(value)
    if shape is not None:
        return f"<{type(value).__name__} {list(shape)} {kind_of(value):.40}>"
    if is_image(value):
        return f"<{value.mode} image of {value.size[0]}x{value.size[1]}>"
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if isinstance(value, (list, tuple, dict)):
        return _brief_of_several(cast("Any", value), depth)
    if isinstance(value, (str, Path, Number, NoneType)):
        try:
            shown = repr(value)
        except Exception:  # noqa: BLE001 - a class of the caller's, or an integer of more digits than Python prints
            return f"<{type(value).__name__}>"
        return shown if len(shown) <= _SHOWN_LONG else f"{shown[:_SHOWN_LONG]}..."
    return f"<{type(value).__name__}>"


def _brief_of_several(value: Any, depth: int) -> str:
    opens, closes = "()" if isinstance(value, tuple) else "{}" if isinstance(value, dict) else "[]"
    if depth >= _SHOWN_DEEP:
        return f"{opens}...{closes}"
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value).items()
        shown = [f"{brief(key, depth + 1)}: {brief(item, depth + 1)}" for key, item in islice(entries, _SHOWN)]
    else:
        shown = [brief(item, depth + 1) for item in cast("list[Any]", value[:_SHOWN])]
    more = ["..."] if len(cast("Any", value)) > _SHOWN else []
    return f"{opens}{', '.join(shown + more)}{closes}"
