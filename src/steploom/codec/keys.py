"""The keys of a message's mappings, looked at before it is decoded: nothing but text and 64-bit integers.

Python's hash of tuples and complex numbers is no secret. As keys of a dict, n that are chosen for it take n * n
comparisons, during which nothing else runs; msgspec would build them from any message.
"""

from __future__ import annotations

from steploom.codec.rules import Buffer
from steploom.errors import ProtocolError

LOOKED_AT = 1 << 13
"""Bytes from which on a header is looked at: what fits in fewer is compared in milliseconds."""

_NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
"""First bytes of msgpack's types, and in how many bytes more their size stands; it is their size for the fixed ones."""


def check_keys(header: Buffer, least: int = LOOKED_AT) -> None:
    """Raises an error if a header of ``least`` bytes or more has other keys.

    Raises:
        ProtocolError: It has; or it is not one whole msgpack value.
    """
    data = memoryview(header).cast("B")
    if len(data) < least:
        return
    try:
        whole = _after(data, 0) == len(data)
    except (IndexError, RecursionError):
        whole = False
    if not whole:
        raise _damaged()


def _after(data: memoryview, at: int) -> int:
    """Where the value ends that begins ``at`` that byte."""
    code = data[at]
    if code < 0x80 or code >= 0xE0:
        return at + 1
    if code < 0x90:
        return _after_map(data, at + 1, code & 0x0F)
    if code < 0xA0:
        return _after_array(data, at + 1, code & 0x0F)
    if code < 0xC0:
        return at + 1 + (code & 0x1F)
    if code in _NUMBERS:
        return at + 1 + _NUMBERS[code]
    wide = _TEXT.get(code) or _BYTES.get(code)
    if wide:
        return at + 1 + wide + _size(data, at + 1, wide)
    if code in _ARRAYS:
        return _after_array(data, at + 1 + _ARRAYS[code], _size(data, at + 1, _ARRAYS[code]))
    if code in _MAPS:
        return _after_map(data, at + 1 + _MAPS[code], _size(data, at + 1, _MAPS[code]))
    if code in _EXTENSIONS:
        wide = _EXTENSIONS[code]
        return _after_extension(data, at + 2 + wide, _size(data, at + 1, wide))
    if code in _FIXED_EXTENSIONS:
        return _after_extension(data, at + 2, _FIXED_EXTENSIONS[code])
    return at + 1  # nil, true, false, and what is no msgpack


def _size(data: memoryview, at: int, wide: int) -> int:
    return int.from_bytes(data[at : at + wide], "big")


def _after_array(data: memoryview, at: int, items: int) -> int:
    for _ in range(items):
        at = _after(data, at)
    return at


def _after_map(data: memoryview, at: int, items: int) -> int:
    for _ in range(items):
        code = data[at]
        if not (code < 0x80 or 0xA0 <= code < 0xC0 or code >= 0xE0 or 0xCC <= code <= 0xD3 or code in _TEXT):
            raise ProtocolError("a mapping in a message has keys that are neither text nor integers")
        at = _after(data, _after(data, at))
    return at


def _after_extension(data: memoryview, at: int, nbytes: int) -> int:
    """What an extension holds is a value again."""
    if _after(data, at) != at + nbytes:
        raise _damaged()
    return at + nbytes


def _damaged() -> ProtocolError:
    return ProtocolError("a message cannot be decoded: a value ends before its bytes, or after them")
