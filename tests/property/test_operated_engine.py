"""An engine that is operated while its workers die: every request has one outcome, of one model."""

from __future__ import annotations

import asyncio
import logging

import anyio
import anyio.lowlevel
import pytest
from operated_world import World


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A worker is started again at once, after any number of failed starts, and nobody is told."""
    caplog.set_level(logging.ERROR, "steploom.engine")

    async def sleep(seconds: float) -> None:
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(anyio, "sleep", sleep)


async def worlds(first: int, last: int) -> None:
    for seed in range(first, last):
        try:
            await World(seed).run()
        except BaseException as error:
            error.add_note(f"World({seed})")
            raise
        assert len(asyncio.all_tasks()) == 1, f"World({seed})"


async def test_some_worlds() -> None:
    await worlds(0, 40)


@pytest.mark.slow
async def test_many_worlds() -> None:
    await worlds(40, 1000)
