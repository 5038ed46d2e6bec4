"""Workers that leave a fleet and are lost meanwhile, or were before; and what a loss is to a request."""

from __future__ import annotations

from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest
import torch
from fake_fleet import homes
from fakes import FakeExecutor
from test_engine_fleet_operations import begun, both_busy, freed

from steploom import AsyncDiffusionEngine, EngineError, EngineObserver, WorkerDied
from steploom.protocol import RunnerOutput, SchedulerOutput


async def test_a_worker_that_is_lost_while_it_leaves_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with both_busy() as (engine, executor, group, asked):
        replaced: list[int] = []

        async def recover(worker: int = 0) -> None:
            replaced.append(worker)

        monkeypatch.setattr(executor, "recover", recover)
        left = await begun(engine.scale, group, 1)
        executor.deaths[1].set()
        await left.wait()
        assert (engine.workers, replaced) == (["serves"], [])
    assert asked.done == ["a", "b"]


async def test_a_worker_that_was_replaced_once_ends_what_it_has_before_it_leaves() -> None:
    async with both_busy() as (engine, executor, group, asked):
        executor.deaths[1].set()
        await anyio.wait_all_tasks_blocked()
        assert engine.workers == ["serves"] * 2
        ticks = len(executor.log)
        left: Any = await begun(engine.scale, group, 1)
        assert not left.is_set()
        await freed(executor, 1)
        await left.wait()
        assert "b" not in homes(executor, ticks), "nobody else began it anew"
    assert asked.done == ["a", "b"]


class Drawing(FakeExecutor):
    """In this process: draws from its request's generator, and is lost with the first tick."""

    in_process = True
    drawn: ClassVar[list[float]] = []

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        for new in output.scheduled_new_reqs:
            self.drawn.append(float(torch.rand((), generator=new.request.params["generator"])))
        if len(self.drawn) == 1:
            raise WorkerDied(0, -9)
        return await super().execute_step(output)

    def discard(self, fault: EngineError) -> bool:
        return True

    async def recover(self) -> None:
        await anyio.lowlevel.checkpoint()


class Witness(EngineObserver):
    def __init__(self) -> None:
        self.restarted: list[tuple[str, int]] = []

    def on_restarted(self, request_id: str, attempt: int) -> None:
        self.restarted.append((request_id, attempt))


async def test_who_is_replayed_draws_what_it_has_drawn_and_observers_are_told() -> None:
    async with AsyncDiffusionEngine(distributed_executor_backend=Drawing, costs_file=None) as engine:
        engine.observers.append(witness := Witness())
        await engine.generate("a cat", request_id="a", generator=torch.Generator().manual_seed(5))
    assert Drawing.drawn == [float(torch.rand((), generator=torch.Generator().manual_seed(5)))] * 2
    assert witness.restarted == [("a", 1)]
