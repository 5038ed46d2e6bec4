"""Warming up `steploom serve`: a limit narrower than what it asks for must not keep the server from starting."""

from __future__ import annotations

import pytest
from embedding import Ends

from steploom.cli.serving.serve import _warm_up
from steploom.testing import FakeEngine


@pytest.mark.parametrize(
    ("limits", "served"), [({}, 2), ({"max_steps": 1}, 2), ({"max_waiting": 1}, 1), ({"max_pixels": 1000}, 0)]
)
async def test_it_stays_within_the_limits(limits: dict[str, int], served: int) -> None:
    ends = Ends()
    async with FakeEngine(**limits) as engine:
        engine.observers.append(ends)
        await _warm_up(engine)
    assert [error for _, error in ends.seen] == [None] * served
