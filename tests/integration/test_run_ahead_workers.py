"""What is added to a tick reaches a worker process and a thread alike, in time or too late; and what a gap is."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from scripted_runner import Gate

from steploom import AsyncDiffusionEngine, EngineConfig
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.protocol import NewRequest, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest


class ScriptedProcess(MultiprocExecutor):
    runner = "scripted_runner:make"


class ScriptedThread(InprocExecutor):
    runner = "scripted_runner:make"


@pytest.fixture(params=[ScriptedProcess, ScriptedThread], ids=["mp", "inproc"])
async def executor(request: pytest.FixtureRequest) -> Any:
    executor = request.param(EngineConfig(max_batch=2, max_resident=2))
    await executor.start()
    yield executor
    await executor.shutdown()


def new(name: str) -> NewRequest:
    return NewRequest(f"{name}#0", DiffusionRequest(name, request_id=name, seed=1))


def runs(answer: RunnerOutput) -> list[str]:
    return [report.run_id for report in answer.reports]


async def test_an_amendment_is_part_of_the_tick(executor: DiffusionExecutor, gate: Gate) -> None:
    answers: list[RunnerOutput] = []

    async def execute(output: SchedulerOutput) -> None:
        answers.append(await executor.execute_step(output))

    async with anyio.create_task_group() as group:
        group.start_soon(execute, SchedulerOutput(1, [new("a"), new("b")], batch_key=f"hold {gate.path}"))
        await gate.reached()
        executor.amend(SchedulerOutput(2, [new("c")], finished_req_ids=["b#0"]))  # Surely there before the tick is.
        group.start_soon(execute, SchedulerOutput(2, [], ["a#0", "b#0"]))
        await anyio.wait_all_tasks_blocked()
        gate.open()
    assert [runs(answer) for answer in answers] == [["a#0", "b#0"], ["a#0", "c#0"]]
    assert [answer.amendments for answer in answers] == [0, 1]


async def test_an_amendment_that_comes_too_late_waits_for_who_names_it(executor: DiffusionExecutor) -> None:
    await executor.execute_step(SchedulerOutput(1, [new("a")]))
    executor.amend(SchedulerOutput(1, [new("b"), new("c")], finished_req_ids=["a#0"]))
    answer = await executor.execute_step(SchedulerOutput(2, [], ["b#0"]))
    assert (runs(answer), answer.amendments) == (["b#0"], 0)
    assert runs(await executor.execute_step(SchedulerOutput(3, [], ["b#0", "c#0"]))) == ["b#0", "c#0"]


async def test_who_finds_no_place_waits_for_one(executor: DiffusionExecutor) -> None:
    await executor.execute_step(SchedulerOutput(1, [new("a"), new("b")]))
    answer = await executor.execute_step(SchedulerOutput(2, [new("c")], ["a#0"]))
    assert sorted(runs(answer)) == ["a#0", "c#0"], "whoever waits is reported, and steps nowhere"
    log = await executor.collective_rpc("log", unique_reply_rank=0)
    answer = await executor.execute_step(SchedulerOutput(3, [], ["c#0"], ["b#0"]))
    assert runs(answer) == ["c#0"]
    assert log[:2] == ["tick 1", "tick 2"]


async def test_a_gap_is_the_time_between_two_ticks_with_programs(executor: DiffusionExecutor) -> None:
    first = await executor.execute_step(SchedulerOutput(1, [new("a")]))
    second = await executor.execute_step(SchedulerOutput(2, [], ["a#0"]))
    third = await executor.execute_step(SchedulerOutput(3, [], [], ["a#0"]))
    fourth = await executor.execute_step(SchedulerOutput(4, [new("b")]))
    assert first.gap_s == first.idle_s == fourth.gap_s == fourth.idle_s == 0, "nothing was resident"
    for answer in (second, third):
        assert answer.gap_s > 0
        assert answer.gap_s >= answer.idle_s >= 0  # none, if the tick was there before the worker had looked


@pytest.mark.slow
async def test_results_are_the_same_with_and_without() -> None:
    sums: list[list[float]] = []
    for run_ahead in (True, False):
        config = EngineConfig(max_batch=2, max_resident=2, run_ahead=run_ahead, torch_threads=1)
        outputs: dict[int, Any] = {}
        async with AsyncDiffusionEngine(config) as engine, anyio.create_task_group() as group:

            async def one(index: int, engine: AsyncDiffusionEngine = engine, outputs: dict[int, Any] = outputs) -> None:
                outputs[index] = await engine.generate(
                    "a red circle", seed=index, num_inference_steps=1 + index, height=32, width=32, output_type="pt"
                )

            for index in range(4):
                group.start_soon(one, index)
        assert [outputs[index].timings.steps for index in range(4)] == [1, 2, 3, 4]
        sums.append([float(outputs[index].images.double().sum()) for index in range(4)])
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
