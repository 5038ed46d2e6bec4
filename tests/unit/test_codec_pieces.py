"""Long lists and mappings, which are written piece by piece."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steploom import codec
from steploom.codec import pieces, writer
from steploom.errors import InvalidRequest, QueueFull
from steploom.executor.lengths import SHORT, is_short
from steploom.protocol import WorkerStats
from steploom.requests import DiffusionRequest

PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.binary(max_size=3) | st.complex_numbers()
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(-(2**63), 2**63 - 1), inner, max_size=5)
        | inner.map(lambda value: DiffusionRequest("a", seed=1, extra=value, more=[value]))
    ),
    max_leaves=40,
)


def shown(value: Any) -> str:
    return repr(value).replace("nan", "0")


@given(VALUES, st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_any_size_are_the_same_message(monkeypatch: pytest.MonkeyPatch, value: Any, size: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "PIECE", size)
        frames = codec.encode(value)
    assert shown(codec.decode(frames, Any)) == shown(codec.decode(codec.encode(value), Any))


@pytest.mark.parametrize("number", [15, 16, 17, 511, 512, 513, 527, 528, 1024, 65535, 65536, 70000])
def test_lists_and_mappings_of_any_length(number: int) -> None:
    many = list(range(number))
    (listed,) = codec.encode(many)
    assert listed == msgspec.msgpack.encode(many)
    assert codec.decode([listed], Any) == many
    entries = {index: str(index) for index in many}
    (mapped,) = codec.encode(entries)
    assert mapped == msgspec.msgpack.encode(entries)
    assert codec.decode(codec.encode((many, {"a": {"b": many}})), Any) == (many, {"a": {"b": many}})


def test_what_stands_beside_long_lists_travels_too() -> None:
    many: list[Any] = [[float(index)] * 100 for index in range(100)]
    value = [many, WorkerStats(ticks=3), (many, b"x" * 5000), {1: many}, QueueFull("full"), b"y" * 5000, many]
    arrived = codec.decode(codec.encode(value), Any)
    assert (arrived[:4], arrived[5:]) == (value[:4], value[5:])
    request = codec.decode(codec.encode(DiffusionRequest("a", seed=1, sigmas=many)), DiffusionRequest)
    assert request.params["sigmas"] == many


def test_no_piece_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def pack(value: Any) -> bytes:
        packed = msgspec.msgpack.encode(value)
        written.append(len(packed))
        return packed

    monkeypatch.setattr(pieces, "_pack", pack)
    text = "a long prompt of some words" * 10
    value = {
        "a": [[1.5] * 40] * 900,
        "b": ([text] * 9000, dict.fromkeys(range(5000), text)),
        "c": [dict.fromkeys(range(40), 2.5)] * 900,
    }
    assert codec.size(codec.encode(value)) > 4_000_000
    assert max(written) < 50_000


def test_what_cannot_travel_is_found_after_many_that_can() -> None:
    with pytest.raises(InvalidRequest, match=r"^\[1000\]: an object of type"):
        codec.encode([*range(1000), object()])
    with pytest.raises(InvalidRequest, match=r"^\[1000\]\['a'\]: an object of type"):
        codec.encode({**dict.fromkeys(range(1000), 1), 1000: {"a": object()}})


@pytest.mark.parametrize(
    ("value", "short"),
    [
        ([None, True, 1, 2.5, 1j, "text", b"bytes", bytearray(10**7)], True),
        ({"a": [1, (2, {3})], 4: frozenset((5,))}, True),
        ([0] * (SHORT // 2), True),
        ([0] * SHORT, True),
        ([0] * (SHORT + 1), False),
        ([[0] * 100] * 100, False),
        (dict.fromkeys(range(SHORT + 1), 0), False),
        (["x" * 1000] * 300, False),
        ([[object()]], False),
    ],
)  # fmt: skip
def test_what_is_short(value: Any, short: bool) -> None:
    assert is_short(value) is short


def test_no_more_is_looked_at_than_is_short() -> None:
    class Counted(list[Any]):
        looked = 0

        def __iter__(self) -> Any:
            for item in super().__iter__():
                type(self).looked += 1
                yield item

    assert not is_short([Counted([1] * 1000) for _ in range(1000)])
    assert Counted.looked <= SHORT
    Counted.looked = 0
    assert not is_short(Counted([1] * (SHORT + 1)))
    assert not Counted.looked
