"""Policies by hand that choose more than there is room for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import FakeExecutor

from steploom import AsyncDiffusionEngine, EngineDead
from steploom.sched import Batch, Policy


class Greedy(Policy):
    """Lets everybody in."""

    def __init__(self, config: Any, clock: Any) -> None:
        super().__init__(config, clock)
        self.waiting: list[Any] = []

    def enqueue(self, state: Any, *, front: bool = False) -> None:
        self.waiting.append(state)

    def withdraw(self, state: Any) -> None:
        self.waiting.remove(state)

    def retire(self, state: Any) -> None: ...

    def observe(self, state: Any) -> None: ...

    def choose(self, max_batch: int, free: int) -> Batch:
        joining, self.waiting = self.waiting, []
        return Batch(None, [], joining)


class Impatient(Greedy):
    """Lets one in at a time, though nobody leaves."""

    def choose(self, max_batch: int, free: int) -> Batch:
        return Batch(None, [], [self.waiting.pop()])


@pytest.mark.parametrize(
    ("policy", "config", "said"),
    [
        (Greedy, {"max_batch": 2}, "3 that join, where there was room for 2 in the batch and for 4 to join"),
        (
            Impatient,
            {"max_batch": 2, "max_resident": 2},
            "1 that join, where there was room for 2 in the batch and for 0",
        ),
        (Greedy, {"scheduler": "request"}, "3 that join, where there was room for 1 in the batch and for 1 to join"),
    ],
)
async def test_a_policy_that_overfills_is_told(policy: type[Policy], config: dict[str, Any], said: str) -> None:
    engine = await AsyncDiffusionEngine(
        distributed_executor_backend=FakeExecutor, policy=policy, costs_file=None, **config
    ).start()
    for failed in await asyncio.gather(*(engine.generate(str(n)) for n in range(3)), return_exceptions=True):
        assert isinstance(failed, EngineDead)
        assert f"policy {policy.__name__} chose more than it may: 0 residents and {said}" in str(failed)
