"""Another model while requests are served: who ends with the old one, who waits for the new one, who fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, fake_engine
from operating import SlowStart, busy, held, prompts

from steploom import (
    AsyncDiffusionEngine,
    ConfigError,
    EngineConfig,
    EngineDead,
    EngineError,
    EngineNotRunning,
    InvalidRequest,
    RequestCancelled,
    WorkerDied,
)
from steploom.executor.abstract import ProgressCallback
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput


async def test_those_that_wait_are_the_new_models_and_the_others_end_with_the_old_one() -> None:
    async with busy(names="abcdef", max_batch=2, max_resident=2) as (engine, old, group, asked):
        await asked.ask("late", timeout=60)
        returned = anyio.Event()

        async def reload() -> None:
            await engine.reload(max_batch=1, max_resident=1, max_steps=7)
            returned.set()

        before = engine.info
        group.start_soon(reload)
        await anyio.wait_all_tasks_blocked()
        new = engine._core.executor
        assert new is not old
        assert engine.info is not before
        assert (engine.config.max_batch, new.config.max_batch) == (1, 1)
        assert not returned.is_set()
        assert not old.shut
        assert asked.done == ["c", "d", "e", "f", "late"] == sorted(prompts(new))
        assert prompts(new) == ["c", "d", "e", "f", "late"], "in the order of their arrival"
        assert new.max_resident == 1
        with pytest.raises(InvalidRequest, match="a live request has this id"):
            await engine.generate("another", request_id="a")
        with pytest.raises(EngineError, match="under way"):
            await engine.reload()
        with pytest.raises(EngineError, match="under way"):
            await engine.sleep()
        assert engine.num_running == 2
        assert await engine.abort("a")
        assert isinstance(await asked.told("a"), RequestCancelled)
        old.let_go()
        await returned.wait()
        assert old.shut == 1
        assert prompts(old) == ["a", "b"]
        assert "b" in asked.done
        await engine.generate("g")
        assert prompts(new)[-1] == "g"
    assert engine._operations.cores == [engine._core]


async def test_whom_a_new_model_inherits_keeps_its_clock() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("b", timeout=1000)
        live, loop = engine._core.live, asyncio.get_running_loop()
        live.borrowed["b"].accepted -= 400  # as if it had waited so long
        live.timers.pop("b").cancel()
        live.timers["b"] = loop.call_later(600, asked.of.__setitem__, "b", "the old model's timer was left")
        left = live.timers["b"]
        engine._make_executor = held
        group.start_soon(engine.reload)
        await anyio.wait_all_tasks_blocked()
        new = engine._core.executor
        assert prompts(new) == ["b"]
        assert left.cancelled()
        assert 500 < engine._core.live.timers["b"].when() - loop.time() <= 600
        new.let_go()
        old.let_go()
        assert 400 <= (await asked.told("b")).timings.queued_s < 500


async def test_a_pause_is_for_both_models_and_so_is_its_end() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("b")
        engine._make_executor = held
        group.start_soon(engine.reload)
        await anyio.wait_all_tasks_blocked()
        new = engine._core.executor
        async with anyio.create_task_group() as pausing:
            pausing.start_soon(engine.pause)
            await anyio.wait_all_tasks_blocked()
            new.let_go()
            await anyio.wait_all_tasks_blocked()
            assert len(new.log) == 1
            pausing.cancel_scope.cancel()
        assert (await asked.told("b")).images == ["b"]
        old.let_go()
    assert asked.done == ["a", "b"]


async def test_who_does_not_fit_the_new_model_fails_alone() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("long", num_inference_steps=9)
        await asked.ask("short", num_inference_steps=2)
        group.start_soon(lambda: engine.reload(max_steps=5))
        await anyio.wait_all_tasks_blocked()
        old.let_go()
    assert isinstance(asked.of["long"], InvalidRequest)
    assert "at most 5" in str(asked.of["long"])
    assert asked.done == ["a", "short"]


async def test_whose_reader_leaves_is_taken_from_the_new_model_too() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        async with engine.stream("left"):
            old.release()
            engine._make_executor = held
            group.start_soon(engine.reload)
            await anyio.wait_all_tasks_blocked()
            new = engine._core.executor
            assert prompts(new) == ["left"]
        assert engine._core.scheduler.num_running == 0
        new.let_go()
        old.let_go()
    assert asked.done == ["a"]


class BrokenStart(FakeExecutor):
    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        await anyio.lowlevel.checkpoint()
        raise WorkerDied(0, 1, "no such weights")


async def test_a_model_that_cannot_be_loaded_leaves_everything_as_it_was() -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, _, asked):
        was = (engine.config, engine.info, engine._core)
        with pytest.raises(WorkerDied, match="no such weights"):
            await engine.reload(distributed_executor_backend=BrokenStart, max_steps=7)
        for wrong in ({"max_batch": 0}, {"no_such_field": 1}, {"distributed_executor_backend": "no.such"}):
            with pytest.raises(ConfigError):
                await engine.reload(**wrong)
        assert (engine.config, engine.info, engine._core) == was
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert asked.done == ["a", "b"]
        await engine.reload()


async def test_the_old_model_serves_while_the_new_one_is_loaded() -> None:
    async with fake_engine() as (engine, old), anyio.create_task_group() as group:
        group.start_soon(lambda: engine.reload(distributed_executor_backend=SlowStart))
        await anyio.wait_all_tasks_blocked()
        (incoming,) = [core for core in engine._operations.cores if core.executor is not old]
        assert (await engine.generate("meanwhile")).images == ["meanwhile"]
        await engine.pause()
        await engine.resume()
        group.start_soon(engine.drain)
        await anyio.wait_all_tasks_blocked()
        incoming.executor.loaded.set()
        await anyio.wait_all_tasks_blocked()
        assert engine._core is incoming
        with pytest.raises(EngineNotRunning, match="drains"):
            await engine.generate("late")
        await engine.resume()
        await engine.generate("new")
    assert prompts(old) == ["meanwhile"]


@pytest.mark.parametrize("how", ["close", "cancel", "die"])
async def test_what_comes_while_the_new_model_is_loaded_ends_it(how: str) -> None:
    made: list[Any] = []
    async with fake_engine() as (engine, old):
        errors: list[BaseException] = []

        async def reload() -> None:
            try:
                await engine.reload(distributed_executor_backend=SlowStart)
            except BaseException as error:
                errors.append(error)
                raise

        with contextlib.suppress(BaseExceptionGroup):
            async with anyio.create_task_group() as group:
                group.start_soon(reload)
                await anyio.wait_all_tasks_blocked()
                made += [core for core in engine._operations.cores if core.executor is not old]
                if how == "close":
                    await engine.close()
                elif how == "cancel":
                    group.cancel_scope.cancel()
                else:
                    old.die(WorkerDied(0, -9))
                    await anyio.wait_all_tasks_blocked()
                    made[0].executor.loaded.set()
        kind = {"close": EngineNotRunning, "cancel": asyncio.CancelledError, "die": EngineDead}[how]
        assert [type(error) for error in errors] == [kind]
        assert made[0].executor.shut == 1
        assert made[0].ended.is_set()
        if how == "cancel":
            await engine.generate("as before")


async def test_the_end_of_the_old_model_is_not_the_engines() -> None:
    async with fake_engine() as (engine, _), anyio.create_task_group() as group:
        ends: list[Any] = []

        async def wait() -> None:
            ends.append(await engine.wait_ended())

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await engine.reload()
        await anyio.wait_all_tasks_blocked()
        assert not ends
        engine._core.executor.die(WorkerDied(0, -9))
        await anyio.wait_all_tasks_blocked()
        assert [type(end) for end in ends] == [WorkerDied]


async def test_costs_are_those_of_the_model(tmp_path: Path) -> None:
    kept = tmp_path / "costs.json"
    async with fake_engine(Costly, costs_file=str(kept), model="one") as (engine, _):
        await engine.generate("a cat")
        assert engine.costs()
        await engine.reload(model="two")
        assert not engine.costs()
        assert json.loads(kept.read_text())["owner"]["model"] == "one"
        await engine.reload(model="one")
        assert engine.costs()


class Costly(FakeExecutor):
    """Its ticks take time, or so it says."""

    def answer(self, output: SchedulerOutput) -> RunnerOutput:
        answer = super().answer(output)
        answer.seconds = 0.001
        for report in answer.reports:
            report.rows, report.denoise_s = 1, 0.001
        return answer


async def test_a_given_pipeline_cannot_be_loaded_anew() -> None:
    engine = AsyncDiffusionEngine.from_pipeline(object())
    engine._make_executor = _without_pipeline
    async with engine:
        with pytest.raises(ConfigError, match="from_pipeline"):
            await engine.reload(model="demo")


def _without_pipeline(config: EngineConfig, pipeline: Any = None) -> FakeExecutor:
    return FakeExecutor(config)
