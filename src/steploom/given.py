"""What callers give, whatever it is for: finite numbers, whole characters, nothing nested without end. No torch."""

from __future__ import annotations

import math
from typing import Any

from steploom.errors import InvalidRequest
from steploom.media.pictures import brief, is_tensor, leaves

MOST = 2**63 - 1
"""The greatest integer that torch takes."""

_PLAIN = (bool, int, float, complex, str)


def plain(value: Any) -> Any:
    """Numpy's scalars as Python's; anything else as it is."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item") or is_tensor(value):
        return value
    item = value.item()
    return item if isinstance(item, _PLAIN) else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, within 64 bits if an integer; numpy's and torch's too, True and False not."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's and torch's
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MOST


def is_whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no tokenizer takes and which has no UTF-8 form."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def check(field: str, value: Any, said: str | None = None) -> None:
    """Refuses a value that holds, in whatever lists and dicts, half a character or a number that is none.

    Args:
        field: What it was given as.
        value: Anything.
        said: What a message calls it, if not ``field``.

    Raises:
        InvalidRequest: It does, or is nested too deep.
    """
    for leaf in leaves(field, value):
        if isinstance(leaf, str) and not is_whole(leaf):
            raise InvalidRequest(
                f"{said or field}={brief(leaf)}: has half of a surrogate pair; give whole characters", field=field
            )
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) and not is_number(leaf):
            inside = "" if leaf is value else f" holds {brief(leaf)}:"
            raise InvalidRequest(
                f"{said or field}={brief(value)}:{inside} must be a finite number, and within 64 bits if an integer",
                field=field,
            )
