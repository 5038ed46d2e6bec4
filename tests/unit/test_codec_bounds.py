"""What one message may come to, in bytes and in work."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from steploom import codec
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
