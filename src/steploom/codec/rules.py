"""What writer and reader agree on: extension codes, limits, and which types exist on the wire."""

from __future__ import annotations

import enum
import re

import msgspec

from steploom import protocol, requests

Buffer = bytes | bytearray | memoryview
"""One frame."""

MAX_DEPTH = 64
"""How deep containers may be nested."""
MAX_HASHED = 1024
"""Items of a set, and integers beyond 64 bits in a message, at most. Python's hash of them is no secret: n that are
chosen for it take n * n comparisons in a set, or as keys."""
MAX_DIMENSIONS = 64
"""Of a tensor or an array, at most; numpy has no more. To multiply very many sizes takes for ever."""
FRAME_BYTES, WORDS_BYTES = 1 << 16, 1 << 12
"""Room in a message for what is around its parts, and for the reason why one of them was left out."""
INLINE_BYTES = 1024
"""Byte strings up to this length stay in the header."""
PACKAGES = ("diffusers",)
"""Packages whose dataclasses may travel, if nothing else is said."""
NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUMm][1-9]\d*(\[\w+\])?")
"""numpy's dtypes that travel: no objects, no records."""

STRUCTS: dict[str, type[msgspec.Struct]] = {
    name: kind
    for module in (protocol, requests)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct
}
"""Structs that may stand in a field declared ``Any``, by name."""


class Code(enum.IntEnum):
    """Codes of msgpack extensions. What an extension holds is msgpack again.

    ``frame`` is the index of a payload frame, from 1.
    """

    TUPLE = 1  # [item, ...]
    SET = 2  # [item, ...]
    FROZENSET = 3  # [item, ...]
    INTEGER = 4  # text, hexadecimal: beyond 64 bits
    COMPLEX = 5  # [real, imaginary]
    BYTES = 6  # frame
    TENSOR = 7  # [frame, dtype, shape]
    ARRAY = 8  # [frame, dtype, shape]
    SCALAR = 9  # [dtype, bytes]
    IMAGE = 10  # [frame, mode, [width, height], palette]
    TORCH_DTYPE = 11  # text
    TORCH_DEVICE = 12  # text
    DATACLASS = 13  # [module, qualified name, {field: value}]
    STRUCT = 14  # [name, {field: value}]
    REQUEST = 15  # {field: value}
    ERROR = 16  # ErrorInfo
    GENERATOR = 17  # [frame, device type]; of one that came before in the message [its place, from 0, null]


def dotted_root(name: str) -> str:
    """Top-level package of a module's name."""
    return name.partition(".")[0]
