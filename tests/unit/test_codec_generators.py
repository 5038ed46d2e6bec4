"""Generators on the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from steploom import codec
from steploom.codec.rules import Code
from steploom.errors import ProtocolError


def test_generators_travel_with_their_state_and_are_as_many_as_before() -> None:
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    torch.rand(700, generator=one)
    first, again, second = codec.decode([bytearray(frame) for frame in codec.encode([one, one, other])], list)
    assert first is again, "what draws from one generator does so there"
    assert first is not one
    assert second is not first
    drawn = [torch.rand(700, generator=generator) for generator in (first, again, second)]
    assert all(map(torch.equal, drawn, [torch.rand(700, generator=generator) for generator in (one, one, other)]))


@pytest.mark.parametrize(
    "told",
    [[1, "nowhere"], [1, "cpu"], [2, "cpu"], [0, None], [-1, None], [1], 0],
    ids=lambda told: str(told).replace(" ", ""),
)
def test_a_damaged_generator_is_an_error(told: Any) -> None:
    inner = msgspec.msgpack.Ext(int(Code.GENERATOR), msgspec.msgpack.encode(told))
    with pytest.raises(ProtocolError):
        codec.decode([msgspec.msgpack.encode([inner]), bytearray(b"no state")], Any)
