"""Pause, resume and drain: who is refused, who goes on, who ends, whoever calls or leaves meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, WholeFake, assert_empty, fake_engine, settled
from interruption import at_every_await
from operating import Outcomes, busy

from steploom import (
    ConfigError,
    DeadlineExceeded,
    DiffusionEngine,
    EngineDead,
    EngineError,
    EngineNotRunning,
    RequestCancelled,
    WorkerDied,
)
from steploom.testing import FakeEngine


async def paused(engine: Any, executor: Any, group: Any) -> None:
    """Pauses while the tick is held."""
    group.start_soon(engine.pause)
    await anyio.wait_all_tasks_blocked()
    executor.let_go()
    await anyio.wait_all_tasks_blocked()
    assert engine.paused


async def test_while_paused_nothing_runs_and_who_comes_waits() -> None:
    async with busy(max_batch=2, max_resident=2) as (engine, executor, group, asked):
        returned = []

        async def pause() -> None:
            await engine.pause()
            returned.append(len(executor.log))

        group.start_soon(pause)
        await anyio.wait_all_tasks_blocked()
        assert not returned, "a tick is under way"
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert returned == [len(executor.log)] == [1]
        await asked.ask("c")
        assert len(executor.log) == 1
        assert (engine.num_running, engine.num_waiting) == (2, 1)
        assert [steps for _, steps in executor.resident.values()] == [1, 1]
        await engine.check_health()
        await engine.pause()
        await engine.resume()
        await engine.resume()
        assert not engine.paused
    assert asked.done == ["a", "b", "c"]
    assert len([new for output in executor.log for new in output.scheduled_new_reqs]) == 3


async def test_while_paused_requests_end_by_their_timeout_by_abort_and_with_their_reader() -> None:
    async with fake_engine() as (engine, executor), anyio.create_task_group() as group:
        executor.held = True
        asked = Outcomes(engine, group)
        await asked.ask("late", "late too", timeout=2)
        await asked.ask("aborted", "stays")
        await paused(engine, executor, group)
        assert (engine.num_running, engine.num_waiting) == (2, 2)
        await asked.ask("later", timeout=0.001)
        with anyio.CancelScope() as scope:
            async with engine.stream("left", request_id="left"):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert await engine.abort("aborted")
        for name in ("late", "late too", "later"):
            assert isinstance(await asked.told(name), DeadlineExceeded)
        assert isinstance(await asked.told("aborted"), RequestCancelled)
        assert (engine.num_running, engine.num_waiting) == (0, 1)
        await engine.resume()
    assert asked.done == ["stays"]


async def test_of_two_that_pause_one_may_leave() -> None:
    async with busy() as (engine, executor, group, asked):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as first:
                first.start_soon(engine.pause)
                group.start_soon(engine.pause)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert engine.paused
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert engine.paused
        assert len(executor.log) == 1
        await engine.resume()
    assert asked.done == ["a", "b"]


async def test_a_pause_that_is_cancelled_was_none() -> None:
    async with busy() as (engine, executor, _, asked):
        with anyio.move_on_after(0):
            await engine.pause()
        assert not engine.paused
        executor.let_go()
    assert asked.done == ["a", "b"]


async def test_resumed_while_it_waits_a_pause_returns() -> None:
    async with busy() as (engine, executor, group, asked):
        group.start_soon(engine.pause)
        await anyio.wait_all_tasks_blocked()
        await engine.resume()
        await anyio.wait_all_tasks_blocked()
        executor.let_go()
    assert asked.done == ["a", "b"]
    assert not engine.paused


async def test_cancelled_at_any_await_a_pause_stops_nobody() -> None:
    async with fake_engine(max_steps=10**6) as (engine, _), engine.stream("a cat", num_inference_steps=10**6) as run:

        async def after() -> None:
            assert not engine.paused
            for _ in range(3):
                await anext(run)

        async def pause() -> None:
            await engine.pause()
            await engine.resume()

        assert await at_every_await(pause, after) >= 1


async def test_whole_requests_cannot_pause() -> None:
    async with fake_engine(WholeFake) as (engine, _):
        with pytest.raises(EngineError, match="WholeFake executes whole requests"):
            await engine.pause()
        assert not engine.paused


@pytest.mark.parametrize("what", ["sleep", "reload"])
async def test_what_would_wait_for_ever_while_paused_is_refused(what: str) -> None:
    async with fake_engine() as (engine, _):
        await engine.pause()
        with pytest.raises(EngineError, match="resume"):
            await getattr(engine, what)()
        await engine.resume()
        assert (await engine.generate("a cat")).images == ["a cat"]


@pytest.mark.parametrize("what", ["pause", "drain", "reload"])
@pytest.mark.parametrize("end", ["close", "die"])
async def test_an_engine_that_ends_meanwhile_says_so(what: str, end: str) -> None:
    async with busy() as (engine, executor, group, asked):
        errors: list[Exception] = []

        async def call() -> None:
            try:
                await getattr(engine, what)()
            except EngineError as error:
                errors.append(error)

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        if what == "reload":
            assert engine._core.executor is not executor
        if end == "close":
            await engine.close()
        else:
            engine._core.executor.die(WorkerDied(0, -9))
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        # What ran when the model was replaced ends with the old one, whatever becomes of the new one.
        kinds = {"close": EngineNotRunning, "die": EngineDead}
        assert [type(error) for error in errors] == ([] if what == "reload" else [kinds[end]])
        assert {type(outcome) for outcome in asked.of.values()} == {
            RequestCancelled if end == "close" else WorkerDied
        } or (what, end, asked.done) == ("reload", "die", ["a", "b"])
        await engine.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with engine:  # what held of the one before holds of it no more
        assert (engine.paused, engine.draining) == (False, False)
        await engine.generate("a cat")


async def test_drain_refuses_the_new_and_lets_the_others_end() -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, group, asked):
        ended: list[int] = []

        async def drain(timeout_s: float | None) -> None:
            ended.append(await engine.drain(timeout_s))

        group.start_soon(drain, None)
        group.start_soon(drain, 1000.0)
        await anyio.wait_all_tasks_blocked()
        assert engine.draining
        for call in (engine.generate("new"), engine.reload()):
            with pytest.raises(EngineNotRunning, match=r"drains.*resume"):
                await call
        assert not ended
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert ended == [0, 0]
        assert asked.done == ["a", "b"]
        with pytest.raises(EngineNotRunning, match="drains"):
            await engine.generate("new")
        assert await engine.drain() == 0
        await engine.resume()
        assert (await engine.generate("new")).images == ["new"]


@pytest.mark.parametrize("limit", [0, 0.01])
async def test_what_has_not_ended_in_time_is_ended(limit: float) -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, _, asked):
        assert await engine.drain(limit) == 2
        await anyio.wait_all_tasks_blocked()
        for outcome in asked.of.values():
            assert isinstance(outcome, RequestCancelled)
            assert f"timeout_s={limit}" in str(outcome)
        executor.let_go()
        await engine.resume()
        await engine.generate("new")


async def test_a_drain_lets_a_paused_engine_go_on_and_a_pause_meanwhile_counts() -> None:
    async with busy() as (engine, executor, group, asked):
        await paused(engine, executor, group)
        executor.held = True
        group.start_soon(engine.drain)
        await executor.ticking()
        assert (engine.paused, engine.draining) == (False, True)
        await paused(engine, executor, group)
        assert not asked.of
        await engine.resume()
        await anyio.wait_all_tasks_blocked()
        assert asked.done == ["a", "b"]
        assert not engine.draining, "resumed before it was drained"


async def test_resumed_while_it_waits_a_drain_ends_nobody() -> None:
    async with busy() as (engine, executor, _, asked):
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain, 1000.0)
            await anyio.wait_all_tasks_blocked()
            await engine.resume()
        assert not engine.draining
        assert not asked.of
        executor.let_go()
    assert asked.done == ["a", "b"]


async def test_a_drain_that_is_cancelled_was_none_unless_another_one_goes_on() -> None:
    async with busy() as (engine, executor, group, asked):
        with anyio.move_on_after(0):
            await engine.drain()
        assert not engine.draining
        group.start_soon(engine.drain)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0):
            await engine.drain()
        assert engine.draining
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert engine.draining
        assert asked.done == ["a", "b"]


@pytest.mark.parametrize("limit", [-1, float("nan"), True, "1", 10**400])
async def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    async with fake_engine() as (engine, _):
        with pytest.raises(ConfigError, match="drain_s="):
            await engine.scale(2, drain_s=limit)
        with pytest.raises(ConfigError, match="timeout_s="):
            await engine.drain(limit)
        assert not engine.draining


@pytest.mark.parametrize("what", ["pause", "drain", "reload", "sleep"])
async def test_cancelled_at_every_await(what: str) -> None:
    async with fake_engine() as (engine, executor):

        async def call() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(engine.generate, "a cat")
                await anyio.lowlevel.checkpoint()
                await getattr(engine, what)()
                await (engine.wake_up if what == "sleep" else engine.resume)()

        async def after() -> None:
            await anyio.wait_all_tasks_blocked()
            told = [rpc[0] for rpc in executor.rpcs]
            assert engine.asleep == (told[-1:] == ["sleep"]), "else the worker refuses what the engine takes"
            if engine.asleep:
                await engine.wake_up()
            await engine.resume()  # Cancelled behind its last await it had succeeded.
            assert (engine.paused, engine.draining) == (False, False)
            assert (await engine.generate("a dog")).images == ["a dog"]
            for core in engine._operations.cores[:-1]:
                await core.ended.wait()
            await settled(engine)
            assert_empty(engine)
            await anyio.wait_all_tasks_blocked()
            assert len(asyncio.all_tasks()) == len(before)
            assert not engine._operations.reloading
            assert len(engine._operations.cores) == 1

        before = asyncio.all_tasks()
        assert await at_every_await(call, after) >= 2


def test_the_blocking_twin_has_them_too() -> None:
    with DiffusionEngine(distributed_executor_backend=FakeExecutor) as engine:
        engine.pause()
        engine.resume()
        assert engine.drain(1.0) == 0
        with pytest.raises(EngineNotRunning, match="drains"):
            engine.generate("a cat")
        engine.resume()
        engine.reload(max_batch=3)
        assert engine.config.max_batch == 3
        assert engine.generate("a cat").images == ["a cat"]


async def test_the_pretended_engine_has_them_too() -> None:
    async with FakeEngine() as engine:
        await engine.pause()
        await engine.resume()
        await engine.reload(max_batch=3)
        assert await engine.drain() == 0
        await engine.resume()
        assert (await engine.generate("a cat", height=64, width=64)).images
