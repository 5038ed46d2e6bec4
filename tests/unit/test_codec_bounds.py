"""What one message may come to, in bytes and in work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom import codec
from steploom.codec.keys import LOOKED_AT
from steploom.codec.rules import MAX_DIMENSIONS, MAX_HASHED, Code
from steploom.errors import InvalidRequest, ProtocolError

COLLIDING = [(number + 8) * (2**61 - 1) for number in range(16_000)]
"""Python's hash of each is 0."""


def extension(code: Code, value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(int(code), msgspec.msgpack.encode(value))


@pytest.mark.parametrize("code", [Code.SET, Code.FROZENSET])
def test_a_set_has_a_bounded_number_of_items(code: Code) -> None:
    kind = set if code is Code.SET else frozenset
    most = kind(range(MAX_HASHED))
    assert codec.decode(codec.encode(most), Any) == most
    with pytest.raises(InvalidRequest, match="a set of more than 1024 items cannot travel; give a list"):
        codec.encode({"a": kind(range(MAX_HASHED + 1))})
    with pytest.raises(ProtocolError, match="length <= 1024"):
        codec.decode([msgspec.msgpack.encode(extension(code, list(range(MAX_HASHED + 1))))], Any)


def big(number: int) -> Any:
    """One of them, by itself: what a message has of them counts."""
    return extension(Code.INTEGER, hex(number))


def test_integers_beyond_64_bits_are_of_a_bounded_number() -> None:
    """In lists as well: they may be taken for the keys of a mapping."""
    most = COLLIDING[:MAX_HASHED]
    assert codec.decode(codec.encode(most), Any) == most
    with pytest.raises(InvalidRequest, match="integers beyond 64 bits cannot travel; give an array or text"):
        codec.encode(COLLIDING)
    packed = [big(number) for number in COLLIDING]
    with pytest.raises(ProtocolError, match="more than 1024 integers beyond 64 bits"):
        codec.decode([msgspec.msgpack.encode(packed)], Any)
    sets = [extension(Code.SET, packed[start : start + 1000]) for start in range(0, 16_000, 1000)]
    with pytest.raises(ProtocolError, match="more than 1024 integers beyond 64 bits"):
        codec.decode([msgspec.msgpack.encode(sets)], Any)


@pytest.mark.parametrize("code", [Code.TENSOR, Code.ARRAY])
def test_a_tensor_has_a_bounded_number_of_dimensions(code: Code) -> None:
    """Before they are multiplied: a frame of a megabyte has a hundred thousand, which took two minutes."""
    dtype = "uint8" if code is Code.TENSOR else "|u1"
    many = msgspec.msgpack.encode(extension(code, [1, dtype, [2**63 - 1] * 100_000]))
    with pytest.raises(ProtocolError, match=f"length <= {MAX_DIMENSIONS}"):
        codec.decode([many], Any)
    most = torch.ones([1] * MAX_DIMENSIONS)
    given = most if code is Code.TENSOR else most.numpy()
    assert codec.decode(codec.encode(given), Any).shape == most.shape
    with pytest.raises(InvalidRequest, match="a tensor of more than 64 dimensions cannot travel; reshape it"):
        codec.encode(most[None])


def test_a_message_has_a_bounded_number_of_bytes() -> None:
    value = [torch.zeros(1000), b"x" * 3000]
    frames = codec.encode(value)
    nbytes = codec.size(frames)
    assert nbytes == 7000 + len(frames[0])
    assert codec.size(codec.encode(value, limit=nbytes)) == nbytes
    assert codec.decode(frames, Any, limit=nbytes)[1] == value[1]
    with pytest.raises(InvalidRequest, match=f"max_message_bytes={nbytes - 1}: a message of {nbytes} bytes"):
        codec.encode(value, limit=nbytes - 1)
    with pytest.raises(ProtocolError, match=f"max_message_bytes={nbytes - 1}: a message of {nbytes} bytes has come"):
        codec.decode(frames, Any, limit=nbytes - 1)


def test_parts_are_taken_while_there_is_room() -> None:
    room = codec.Room(2**20, parts=3)
    room.take([bytes(600_000)])
    with pytest.raises(InvalidRequest, match="max_message_bytes=1048576: these are 400000 bytes"):
        room.take([bytes(200_000), bytes(200_000)])
    room.take([bytes(300_000)])


TUPLES = [tuple(-1 - (number >> bit & 1) for bit in range(12)) for number in range(4096)]
"""Python's hash of each is the same, as -1 and -2 have the same."""
KEYS: dict[str, Callable[[], bytes]] = {
    "arrays": lambda: msgspec.msgpack.encode(dict.fromkeys(TUPLES)),
    "extensions": lambda: mapping(msgspec.msgpack.encode(extension(Code.TUPLE, key)) for key in TUPLES),
    "complex numbers": lambda: mapping(
        msgspec.msgpack.encode(extension(Code.COMPLEX, [-1000003.0 * number, float(number)])) for number in range(9999)
    ),
    "within": lambda: msgspec.msgpack.encode({"a": [1, extension(Code.TUPLE, [dict.fromkeys(TUPLES)])]}),
    "numbers": lambda: mapping(msgspec.msgpack.encode(float(number)) for number in range(9999)),
}


def mapping(keys: Iterable[bytes]) -> bytes:
    """A msgpack map of these, with values that are nothing."""
    packed = [key + b"\xc0" for key in keys]
    return b"\xdf" + len(packed).to_bytes(4, "big") + b"".join(packed)


@pytest.mark.parametrize("kind", KEYS)
def test_keys_are_text_or_integers(kind: str) -> None:
    """Before any of them is compared with another."""
    with pytest.raises(ProtocolError, match="keys that are neither text nor integers"):
        codec.decode([KEYS[kind]()], Any)


WIDTHS = [0, 1, 5, 31, 32, 255, 256, 65535, 65536]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
        | st.binary() | st.sampled_from(WIDTHS).map(lambda width: "x" * width),
        lambda inner: st.lists(inner, max_size=40) | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=40) | st.integers(-(2**63), 2**63 - 1), inner, max_size=40),
    )
)  # fmt: skip
def test_what_is_sent_has_such_keys(value: Any) -> None:
    padding = "x" * LOOKED_AT
    assert codec.decode(codec.encode([padding, value]), Any) == [padding, value]


@pytest.mark.parametrize("count", [15, 16, 65535, 65536])
def test_keys_of_large_mappings_are_looked_at(count: int) -> None:
    value = {number: [number] for number in range(count)}
    assert codec.decode(codec.encode(value), Any) == value
    packed = msgspec.msgpack.encode([value | {"last": {(1, 2): 3}}, "x" * LOOKED_AT])
    with pytest.raises(ProtocolError, match="keys that are neither"):
        codec.decode([packed], Any)


def test_an_extension_is_as_long_as_what_it_holds() -> None:
    """Else what is looked at and what is decoded would not be the same."""
    pair = msgspec.msgpack.encode([1.0, 2.0])
    for content in (pair + b"\xc0", pair[:-1]):
        message = ["x" * LOOKED_AT, msgspec.msgpack.Ext(int(Code.COMPLEX), content)]
        with pytest.raises(ProtocolError, match="a value ends before its bytes, or after them"):
            codec.decode([msgspec.msgpack.encode([message, 0])], Any)
