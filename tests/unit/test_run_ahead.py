"""The engine sends the next tick while one runs; joins and cancels still act at the next step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, fake_engine

from steploom import AsyncDiffusionEngine, EngineConfig, RequestCancelled
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.sched import Fcfs, StepScheduler
from steploom.worker.agenda import Agenda


class AheadFake(FakeExecutor):
    """A worker with two ticks in flight, which begin only when the test releases them."""

    ticks_in_flight = 2

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.agenda = Agenda(config.resident_limit)
        self.begun: list[SchedulerOutput] = []
        self.in_flight = self.most_in_flight = 0
        self.held = True
        self._turn = anyio.Lock()
        self.deaf = False
        self.unheard: list[SchedulerOutput] = []

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self.log.append(output)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        async with self._turn:
            fit, amended = self.agenda.begin(output)
            self.begun.append(fit)
            if self.held:
                await self._permits.acquire()
            else:
                await anyio.lowlevel.checkpoint()
            self.in_flight -= 1
            result = self.answer(fit)
            self.agenda.end(fit, result, amended)
            return result

    def answer(self, output: SchedulerOutput) -> RunnerOutput:
        """A worker ignores whom it does not hold."""
        here = {*self.resident, *(new.run_id for new in output.scheduled_new_reqs)}
        cached = [run for run in output.scheduled_cached_reqs if run in here]
        return super().answer(
            SchedulerOutput(output.tick, output.scheduled_new_reqs, cached, output.finished_req_ids, output.batch_key)
        )

    def amend(self, output: SchedulerOutput) -> None:
        if self.deaf:
            self.unheard.append(output)
        else:
            self.agenda.amend(output)


def names(output: SchedulerOutput) -> list[str]:
    return [run.rpartition("#")[0] for run in output.run_ids]


@asynccontextmanager
async def ahead(**config: Any) -> AsyncIterator[tuple[AsyncDiffusionEngine, AheadFake]]:
    async with fake_engine(AheadFake, **config) as (engine, executor):
        try:
            yield engine, executor
        finally:
            executor.let_go()


async def run(engine: AsyncDiffusionEngine, name: str, steps: int = 4) -> None:
    await engine.generate(name, request_id=name, num_inference_steps=steps)


async def test_the_next_tick_is_there_before_one_ends() -> None:
    async with ahead() as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(run, engine, "a")
        await anyio.wait_all_tasks_blocked()
        assert [names(output) for output in executor.log] == [["a"], ["a"]]
        assert len(executor.begun) == 1
        executor.release()
        await anyio.wait_all_tasks_blocked()
        assert (len(executor.begun), len(executor.log)) == (2, 3)
        executor.let_go()
    assert executor.most_in_flight == 2
    assert len(executor.log) == 4, "no tick is sent for what is known to be over"


async def test_eight_at_once_join_the_same_first_tick() -> None:
    async with ahead(max_batch=8) as (engine, executor), anyio.create_task_group() as group:
        for index in range(8):
            group.start_soon(run, engine, f"r{index}")
        await anyio.wait_all_tasks_blocked()
        assert len(names(executor.begun[0])) == 8
        executor.let_go()


async def test_who_comes_while_a_tick_runs_is_in_the_next_one() -> None:
    async with ahead() as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(run, engine, "a")
        await anyio.wait_all_tasks_blocked()
        for name in ("b", "c"):
            group.start_soon(run, engine, name)
        await anyio.wait_all_tasks_blocked()
        executor.release()
        await anyio.wait_all_tasks_blocked()
        assert names(executor.begun[1]) == ["a", "b", "c"]
        executor.let_go()


async def test_who_is_cancelled_while_a_tick_runs_is_not_in_the_next_one() -> None:
    async with ahead() as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(run, engine, "a")
        group.start_soon(fails, engine, "b")
        await anyio.wait_all_tasks_blocked()
        await engine.abort("b")
        await anyio.wait_all_tasks_blocked()
        executor.release()
        await anyio.wait_all_tasks_blocked()
        assert names(executor.begun[1]) == ["a"]
        assert len(executor.begun[1].finished_req_ids) == 1
        executor.let_go()


async def fails(engine: AsyncDiffusionEngine, name: str) -> None:
    with pytest.raises(RequestCancelled):
        await run(engine, name)


async def test_an_amendment_that_comes_too_late_acts_in_the_tick_after() -> None:
    async with ahead() as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(run, engine, "a", 8)
        group.start_soon(fails, engine, "b")
        await anyio.wait_all_tasks_blocked()
        executor.deaf = True
        await engine.abort("b")
        group.start_soon(run, engine, "c")
        await anyio.wait_all_tasks_blocked()
        executor.deaf = False
        executor.release()
        await anyio.wait_all_tasks_blocked()
        assert names(executor.begun[1]) == ["a", "b"], "it has begun before the amendments came"
        for amendment in executor.unheard:
            executor.agenda.amend(amendment)
        executor.release()
        await anyio.wait_all_tasks_blocked()
        assert sorted(names(executor.begun[2])) == ["a", "c"]
        assert len(executor.begun[2].finished_req_ids) == 1
        executor.let_go()


async def test_a_place_is_planned_for_before_it_is_free() -> None:
    async with (
        ahead(max_batch=2, max_resident=2, policy="fcfs") as (engine, executor),
        anyio.create_task_group() as group,
    ):
        for name, steps in (("a", 2), ("b", 4), ("c", 3)):
            group.start_soon(run, engine, name, steps)
        executor.let_go()
    assert [names(output) for output in executor.begun] == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "c"], ["c"]]


async def test_engines_of_one_tick_do_not_run_ahead() -> None:
    class Careful(Fcfs):
        def choose(self, max_batch, free):
            return super().choose(max_batch, free)

    class Own(StepScheduler):
        def _choose(self):
            return super()._choose()

    class Both(StepScheduler):
        def _choose(self):
            return super()._choose()

        def _extend(self, members):
            return super()._extend(members)

    for settings, most in (({}, 2), ({"run_ahead": False}, 1), ({"policy": Careful}, 1), ({"scheduler": Own}, 1),
                           ({"scheduler": Both}, 2)):  # fmt: skip
        async with ahead(**settings) as (engine, executor), anyio.create_task_group() as group:
            executor.let_go()
            group.start_soon(run, engine, "a")
            group.start_soon(run, engine, "b", 7)
        assert executor.most_in_flight == most, settings


def test_who_overrides_execute_step_has_one_tick_in_flight() -> None:
    class Printing(InprocExecutor):
        async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
            return await super().execute_step(output)

    class Named(MultiprocExecutor):
        runner = "my.module:make"

    assert (DiffusionExecutor.ticks_in_flight, Printing.ticks_in_flight) == (1, 1)
    assert (InprocExecutor.ticks_in_flight, MultiprocExecutor.ticks_in_flight, Named.ticks_in_flight) == (2, 2, 2)


async def test_closing_with_two_ticks_in_flight() -> None:
    async with ahead() as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(fails, engine, "a")
        await anyio.wait_all_tasks_blocked()
        assert executor.in_flight == 2
        await engine.close()
    assert executor.shut == 1
