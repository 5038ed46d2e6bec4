"""Starting, closing, dying, sleeping, and the event loop that an engine belongs to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import uvloop
from fakes import FakeExecutor, InProcessFake, assert_empty, fake_engine, settled

from steploom import (
    AsyncDiffusionEngine,
    ConfigError,
    EngineConfig,
    EngineDead,
    EngineError,
    EngineNotRunning,
    RequestCancelled,
    TickTimeout,
    WorkerDied,
)
from steploom.executor.abstract import ProgressCallback
from steploom.protocol import PipelineInfo


def unstarted(kind: type[FakeExecutor] = FakeExecutor, **config: Any) -> AsyncDiffusionEngine:
    return AsyncDiffusionEngine(EngineConfig(distributed_executor_backend=kind, **config))


def others() -> set[Any]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_an_engine_that_is_not_running_says_so() -> None:
    engine = unstarted()
    with pytest.raises(EngineNotRunning, match="async with engine"):
        await engine.generate("a cat")
    await engine.close()
    async with engine:
        with pytest.raises(EngineError, match="runs already"):
            await engine.start()
        await engine.generate("a cat")
    for call in (engine.generate("a cat"), engine.abort("x"), engine.collective_rpc("ping"), engine.check_health()):
        with pytest.raises(EngineNotRunning, match="closed"):
            await call
    await engine.close()
    assert not others()


async def test_a_closed_engine_can_be_started_again() -> None:
    engine = unstarted()
    for _ in range(3):
        async with engine:
            assert (await engine.generate("a cat")).images == ["a cat"]
        assert_empty(engine)
    assert not others()


async def test_start_and_close_may_be_called_from_different_tasks() -> None:
    engine = unstarted()
    async with anyio.create_task_group() as group:
        group.start_soon(engine.start)
    with anyio.CancelScope():  # A scope entered after the start and left before the close: they must not be nested.
        assert (await engine.generate("a cat")).images == ["a cat"]
    async with anyio.create_task_group() as group:
        group.start_soon(engine.close)
        group.start_soon(engine.close)
    assert not others()
    assert engine._core is not None
    assert engine._core.executor.shut == 1


async def test_an_engine_inside_an_async_generator_lives_until_it_ends() -> None:
    @contextlib.asynccontextmanager
    async def lifespan():
        async with unstarted() as engine:
            yield engine

    async with lifespan() as engine:
        assert (await engine.generate("a cat")).images == ["a cat"]
    assert not others()


async def test_closing_tells_the_waiters() -> None:
    async with anyio.create_task_group() as group:
        engine = await unstarted().start()
        engine._core.executor.held = True

        async def wait(name: str) -> None:
            with pytest.raises(RequestCancelled, match="closed"):
                await engine.generate(name)

        for name in "abc":
            group.start_soon(wait, name)
        await engine._core.executor.ticking()
        await engine.close()
    assert not others()


@pytest.mark.parametrize(
    ("error", "kind", "later"),
    [
        (WorkerDied(0, -9, "killed"), WorkerDied, "worker 0 died with exit code -9: killed"),
        (TickTimeout("tick 3 took 300 s"), TickTimeout, "tick 3 took 300 s"),
        (ValueError("a bug"), EngineDead, "ValueError: a bug"),
    ],
)
async def test_a_fault_of_a_tick_reaches_every_waiter_and_every_later_call(error: Any, kind: Any, later: str) -> None:
    async with fake_engine() as (engine, executor), anyio.create_task_group() as group:
        executor.held = True
        raised: list[BaseException] = []

        async def wait(name: str) -> None:
            with pytest.raises(kind) as caught:
                await engine.generate(name)
            raised.append(caught.value)

        for name in "abc":
            group.start_soon(wait, name)
        await executor.ticking()
        executor.tick_error = error
        executor.let_go()
        while len(raised) < 3:
            await anyio.lowlevel.checkpoint()
        assert len({id(one) for one in raised}) == 3
        for call in (engine.generate("later"), engine.check_health(), engine.collective_rpc("ping")):
            with pytest.raises(EngineDead, match=later):
                await call
    assert executor.shut == 1


async def test_death_is_seen_while_nothing_runs_and_a_dead_engine_can_be_started_again() -> None:
    engine = await unstarted().start()
    core = engine._core
    core.executor.die(WorkerDied(2, 1))
    await core.ended.wait()
    with pytest.raises(EngineDead, match="worker 2 died with exit code 1"):
        await engine.generate("a cat")
    assert core.executor.shut == 1
    assert not others()
    async with engine:
        assert (await engine.generate("a cat")).images == ["a cat"]


async def test_a_call_of_the_workers_ends_with_the_engine() -> None:
    async with fake_engine() as (engine, executor), anyio.create_task_group() as group:
        executor.rpc_gate = anyio.Event()

        async def call() -> None:
            with pytest.raises(EngineDead, match="worker 0"):
                await engine.collective_rpc("stats")

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        executor.die(WorkerDied(0, 1))


async def test_collective_rpc_passes_everything_on() -> None:
    async with fake_engine() as (engine, executor):
        assert await engine.collective_rpc("m", timeout=5, args=(1,), kwargs={"a": 2}, unique_reply_rank=0) == "pong"
        assert executor.rpcs == [("m", 5, (1,), {"a": 2}, 0)]
        assert engine.info.pipeline_class == "FakePipeline"


@contextlib.asynccontextmanager
async def falling_asleep(engine: Any, executor: Any) -> AsyncIterator[None]:
    """The engine is told to sleep while a request runs, which ends with the block."""
    executor.held = True
    async with anyio.create_task_group() as group, engine.stream("a cat") as run:
        await executor.ticking()
        group.start_soon(engine.sleep)
        await anyio.wait_all_tasks_blocked()
        yield
        executor.let_go()
        await run.result()
    await settled(engine)
    await anyio.wait_all_tasks_blocked()


async def test_sleep_lets_the_running_end_and_refuses_the_new() -> None:
    async with fake_engine() as (engine, executor):
        async with falling_asleep(engine, executor):
            assert not executor.rpcs
            with pytest.raises(EngineNotRunning, match="wake_up"):
                await engine.generate("new")
        assert [rpc[0] for rpc in executor.rpcs] == ["sleep"]
        await engine.wake_up()
        await engine.generate("new")


async def test_a_cancelled_sleep_leaves_the_engine_awake() -> None:
    async with fake_engine() as (engine, executor):
        executor.held = True
        async with engine.stream("a cat") as run:
            await executor.ticking()
            async with anyio.create_task_group() as group:
                group.start_soon(engine.sleep)
                await anyio.wait_all_tasks_blocked()
                group.cancel_scope.cancel()
            executor.held = False
            executor.release()
            await run.result()
        await engine.generate("new")


async def test_a_sleeper_that_fails_to_sleep_deeper_still_sleeps() -> None:
    async with fake_engine() as (engine, executor):
        await engine.sleep()
        executor.sleep = _refused
        with pytest.raises(ConfigError, match="level=3"):
            await engine.sleep(3)
        with pytest.raises(EngineNotRunning, match="wake_up"):
            await engine.generate("new")
        await engine.wake_up()
        await engine.generate("new")


async def test_woken_while_it_falls_asleep_it_stays_awake() -> None:
    async with fake_engine() as (engine, executor):
        async with falling_asleep(engine, executor):
            await engine.wake_up()
        assert [rpc[0] for rpc in executor.rpcs] == ["wake_up"]
        await engine.generate("new")


async def _refused(level: int) -> None:
    raise ConfigError(f"level={level}: there is none")


class BrokenStart(FakeExecutor):
    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        raise WorkerDied(0, 1, "no such model")


class BrokenShutdown(FakeExecutor):
    async def shutdown(self) -> None:
        raise OSError("disk full")


async def test_a_failed_start_raises_its_reason_and_leaves_nothing() -> None:
    engine = unstarted(BrokenStart)
    with pytest.raises(WorkerDied, match="no such model"):
        await engine.start()
    assert engine._core.executor.shut == 1
    assert not others()
    with pytest.raises(EngineDead, match="no such model"):
        await engine.generate("a cat")


async def test_a_failed_shutdown_is_recorded_and_does_not_hang() -> None:
    engine = await unstarted(BrokenShutdown).start()
    await engine.close()
    assert "disk full" in str(engine._core.failure)


async def test_progress_of_loading_is_told() -> None:
    lines: list[str] = []
    engine = unstarted()
    await engine.start(lines.append)
    await engine.close()
    assert lines == ["loading nothing"]


async def test_two_engines_in_one_loop_are_strangers() -> None:
    async with fake_engine() as (one, _), fake_engine(InProcessFake) as (two, _), anyio.create_task_group() as group:
        for engine, name in ((one, "a"), (two, "b"), (one, "c"), (two, "d")):
            group.start_soon(engine.generate, name)
        with pytest.raises(ValueError, match="live request"):
            async with one.stream("e", request_id="same"), two.stream("f", request_id="same"):
                await two.generate("g", request_id="same")


async def test_another_event_loop_is_refused_with_the_mend() -> None:
    async with fake_engine() as (engine, _):
        caught: list[BaseException] = []

        def elsewhere() -> None:
            for call in (engine.generate("a cat"), engine.close()):
                try:
                    asyncio.run(call)
                except EngineNotRunning as error:
                    caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert len(caught) == 2
        assert all("one engine per event loop" in str(error) for error in caught)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_it_runs_on_asyncio_and_on_uvloop(factory: Any) -> None:
    async def main() -> None:
        async with fake_engine() as (engine, _), anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(engine.generate, str(number))

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_an_engine_that_nobody_closed_ends_with_its_loop() -> None:
    engine = unstarted()

    async def main() -> None:
        await engine.start()
        engine._core.executor.held = True
        run = engine.stream("a cat")
        await run.__aenter__()
        await engine._core.executor.ticking()

    asyncio.run(main())
    assert engine._core.ended.is_set()
    assert engine._core.executor.shut == 1
    gc.collect()


async def test_a_file_of_costs_in_nobodys_home_is_refused_before_anything_starts() -> None:
    engine = unstarted(costs_file="~nosuch/costs.json")
    with pytest.raises(ConfigError, match=r"^costs_file='~nosuch/costs\.json': nobody knows the home '~nosuch'; give"):
        await engine.start()
    assert not others()
