"""What is under way while a model is replaced: waits of the operator, calls of the workers, a full queue."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from fake_fleet import FakeFleet
from fakes import fake_engine
from operating import SlowStart, busy, prompts

from steploom import EngineConfig, QueueFull


@pytest.mark.parametrize("what", ["pause", "drain"])
async def test_who_waits_for_the_old_model_waits_for_the_new_one_too(what: str) -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("b")
        group.start_soon(lambda: engine.reload(distributed_executor_backend=SlowStart))
        await anyio.wait_all_tasks_blocked()
        (incoming,) = [core for core in engine._operations.cores if core.executor is not old]
        new, returned = incoming.executor, []

        async def call() -> None:
            returned.append(await getattr(engine, what)())

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        new.held = True
        new.loaded.set()
        await anyio.wait_all_tasks_blocked()
        assert await engine.abort("a")
        await anyio.wait_all_tasks_blocked()
        assert engine._operations.cores == [incoming], "the old one has ended"
        assert returned == ([None] if what == "pause" else [])
        assert (engine.paused, engine.draining) == (what == "pause", what == "drain")
        assert prompts(new) == ([] if what == "pause" else ["b"])
        new.let_go()
        await anyio.wait_all_tasks_blocked()
        assert returned == ([None] if what == "pause" else [0])
        assert asked.done == ([] if what == "pause" else ["b"])
        await engine.resume()
    assert asked.done == ["b"]


async def test_to_fall_asleep_it_waits_for_an_old_model_that_nobody_waits_for() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(engine.reload)
            await anyio.wait_all_tasks_blocked()
            leaving.cancel_scope.cancel()
        new, first = engine._core.executor, engine._operations.cores[0]
        assert first.executor is old is not new
        group.start_soon(engine.sleep)
        await anyio.wait_all_tasks_blocked()
        assert engine.asleep
        assert not new.rpcs, "a request runs"
        old.let_go()
        await first.ended.wait()
        await anyio.wait_all_tasks_blocked()
        assert asked.done == ["a"]
        assert [rpc[0] for rpc in new.rpcs] == ["sleep"]
        await engine.wake_up()


async def test_the_old_workers_answer_what_they_were_asked() -> None:
    async with fake_engine() as (engine, old), anyio.create_task_group() as group:
        old.rpc_gate = anyio.Event()
        answers: list[Any] = []
        reloaded = anyio.Event()

        async def call() -> None:
            answers.append(await engine.collective_rpc("slow"))

        async def reload() -> None:
            await engine.reload()
            reloaded.set()

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(reload)
        await anyio.wait_all_tasks_blocked()
        assert engine._core.executor is not old
        assert not old.shut
        assert await engine.collective_rpc("quick") == ["pong"], "of the new one"
        assert [rpc[0] for rpc in old.rpcs] == ["slow"]
        assert not answers
        old.rpc_gate.set()
        await reloaded.wait()
        assert answers == [["pong"]]


class StuckFleet(FakeFleet):
    """Its first ticks are held."""

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.stick(*range(self.workers))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bound", [{}, {"max_waiting": 1}, {"max_waiting_s": 1e-9}])
async def test_no_bound_is_held_against_who_was_accepted_already(bound: dict[str, Any], workers: int) -> None:
    async with busy(names="abc", max_batch=1, max_resident=1, max_waiting=3) as (engine, old, group, asked):
        await asked.ask("d")
        assert engine.num_waiting == 3
        engine._make_executor = StuckFleet
        group.start_soon(lambda: engine.reload(data_parallel_size=workers, **bound))
        await anyio.wait_all_tasks_blocked()
        assert not asked.of
        if bound:
            with pytest.raises(QueueFull):
                await engine.generate("new")
        for worker in range(workers):
            engine._core.executor.free(worker)
        old.let_go()
    assert asked.done == ["a", "b", "c", "d"]
