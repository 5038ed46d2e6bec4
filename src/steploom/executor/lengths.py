"""Whether arguments are written in a moment, or had better be written beside the event loop."""

from __future__ import annotations

from typing import Any, cast

SHORT = 1 << 12
"""Values that are written in about a millisecond."""
LETTERS = 64
"""Of a text, which take as long as one value."""


def is_short(value: Any) -> bool:
    """Whether it is written in about a millisecond; looks at no more of it than that takes.

    Tensors, arrays and images are not, whatever their size: some have to be copied, or come from a device that is busy.
    """
    left, found = SHORT, [value]
    while found:
        one = found.pop()
        if isinstance(one, str | bytes | bytearray | memoryview):
            left -= len(one) // LETTERS if isinstance(one, str) else 0
        elif isinstance(one, list | tuple | set | frozenset | dict):
            items = cast("dict[Any, Any] | list[Any]", one)
            left -= len(items)
            if left >= 0:
                found.extend(items.values() if isinstance(items, dict) else items)
        elif one is not None and not isinstance(one, int | float | complex):
            return False
        if left < 0:
            return False
    return True
