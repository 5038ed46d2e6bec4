"""Long lists and mappings, written piece by piece.

msgspec would write all of one at once, and hold Python's lock for tenths of a second; and all that it writes would have
to be there as objects, for the garbage collector to look through. So a thread may write what is long while others run.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from steploom.codec.rules import Code

PIECE = 512
"""Values that are written at once; in a list or mapping of fewer, those within it counted, there is one piece."""
LETTERS = 64
"""Of a text, which count as one value."""
_EXTENSION = b"\xc9"
_LISTS, _MAPPINGS = (0x90, 0xDC), (0x80, 0xDE)
"""First bytes of msgpack's types: of few items, and of more."""
_pack = msgspec.msgpack.encode


class Pieces:
    """The pieces of one message. Marks stand for them in what msgspec writes, until all is put together once."""

    def __init__(self) -> None:
        self._mark = b""
        self._held: list[list[bytes]] = []

    def hold(self, parts: list[bytes]) -> msgspec.Raw:
        """What is to be written where ``parts`` are to stand."""
        self._mark = self._mark or os.urandom(16)  # nobody can know it, and have it in a text
        self._held.append(parts)
        return msgspec.Raw(self._mark + (len(self._held) - 1).to_bytes(4, "big"))

    def parts(self, written: bytes) -> list[bytes]:
        """``written``, with what is to stand in it."""
        if not self._mark or self._mark not in written:
            return [written]
        first, *others = written.split(self._mark)
        found = [first]
        for other in others:
            found += self._held[int.from_bytes(other[:4], "big")]
            found.append(other[4:])
        return found

    def whole(self, value: Any) -> bytes:
        """``value`` as it travels."""
        parts = self.parts(_pack(value))
        return parts[0] if len(parts) == 1 else b"".join(parts)  # of bytes, and so without Python's lock

    def tagged(self, code: Code, value: Any) -> msgspec.msgpack.Ext | msgspec.Raw:
        """An extension that holds ``value``."""
        parts = self.parts(_pack(value))
        if len(parts) == 1:
            return msgspec.msgpack.Ext(code.value, parts[0])
        nbytes = sum(map(len, parts))
        return self.hold([_EXTENSION + nbytes.to_bytes(4, "big") + bytes([code.value]), *parts])


class Long:
    """A list, or a mapping, that is longer than a piece."""

    def __init__(self, pieces: Pieces) -> None:
        self.number = 0
        self._pieces = pieces
        self._parts: list[bytes] = []
        self._first = _LISTS

    def add(self, packed: list[Any] | dict[Any, Any]) -> None:
        """Writes its next items."""
        if packed:
            self._first = _LISTS if type(packed) is list else _MAPPINGS
            self._parts += self._pieces.parts(_pack(packed)[len(_head(self._first, len(packed))) :])
            self.number += len(packed)

    def end(self, packed: list[Any] | dict[Any, Any]) -> msgspec.Raw:
        """Writes its last items; what is to be written where it is to stand."""
        self.add(packed)
        return self._pieces.hold([_head(self._first, self.number), *self._parts])


def _head(first: tuple[int, int], number: int) -> bytes:
    """What msgpack writes before so many items."""
    few, many = first
    if number < 16:
        return bytes([few + number])
    size = 2 if number < 1 << 16 else 4
    return bytes([many + (size == 4)]) + number.to_bytes(size, "big")
