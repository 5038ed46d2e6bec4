"""Sleep and wake: what holds of the engine holds of its workers, whoever leaves, refuses or dies meanwhile."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from fake_fleet import FakeFleet
from fakes import fake_engine
from operating import busy

from steploom import ConfigError, EngineNotRunning


class Levels(FakeFleet):
    """Two workers that sleep one after the other; the second one refuses some levels, and all may refuse to wake."""

    waking = True

    def __init__(self, config: Any, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.levels: list[int | None] = [None, None]
        self.between: anyio.Event | None = None

    async def sleep(self, level: int = 1, worker: int | None = None) -> None:
        for rank in (0, 1) if worker is None else (worker,):
            await anyio.lowlevel.checkpoint()
            if rank == 1 and level == 3:
                raise ConfigError("level=3: there is none")
            if rank == 1 and self.between is not None:
                await self.between.wait()
            self.levels[rank] = level

    async def wake_up(self) -> None:
        await anyio.lowlevel.checkpoint()
        if not self.waking:
            raise ConfigError("there is nothing to wake")
        self.levels = [None, None]


async def test_of_two_that_have_it_sleep_one_may_leave() -> None:
    async with busy() as (engine, executor, group, _):
        first = anyio.CancelScope()

        async def leaving() -> None:
            with first:
                await engine.sleep()

        group.start_soon(leaving)
        group.start_soon(engine.sleep)
        await anyio.wait_all_tasks_blocked()
        first.cancel()
        await anyio.wait_all_tasks_blocked()
        assert engine.asleep
        with pytest.raises(EngineNotRunning, match="sleeps"):
            await engine.generate("new")
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert [rpc[0] for rpc in executor.rpcs] == ["sleep"]
        assert engine.asleep
        await engine.wake_up()


async def test_its_caller_may_leave_once_the_workers_were_told() -> None:
    async with fake_engine(Levels, data_parallel_size=2) as (engine, executor):
        executor.between = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.sleep, 2)
            await anyio.wait_all_tasks_blocked()
            assert executor.levels == [2, None]
            group.cancel_scope.cancel()
        assert engine.asleep
        executor.between.set()
        await anyio.wait_all_tasks_blocked()
        assert executor.levels == [2, 2]
        assert engine.asleep
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(engine.wake_up)
                await anyio.lowlevel.checkpoint()
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert executor.levels == [None, None]
        assert not engine.asleep
        await engine.generate("a cat")


@pytest.mark.parametrize("waking", [True, False])
async def test_if_one_refuses_none_sleeps(waking: bool) -> None:
    async with fake_engine(Levels, data_parallel_size=2) as (engine, executor):
        executor.waking = waking
        with pytest.raises(ConfigError, match="level=3"):
            await engine.sleep(3)
        assert executor.levels == ([None, None] if waking else [3, None])
        assert not engine.asleep, "an executor that can do neither serves on"
        await engine.generate("a cat")


async def test_if_one_refuses_to_sleep_deeper_they_sleep_on() -> None:
    async with fake_engine(Levels, data_parallel_size=2) as (engine, executor):
        await engine.sleep(1)
        with pytest.raises(ConfigError, match="level=3"):
            await engine.sleep(3)
        assert None not in executor.levels
        assert engine.asleep
        await engine.wake_up()


async def test_refused_while_another_one_may_be_granted_nobody_is_woken() -> None:
    async with fake_engine(Levels, data_parallel_size=2) as (engine, executor), anyio.create_task_group() as group:
        executor.between = anyio.Event()
        errors: list[ConfigError] = []

        async def refused() -> None:
            try:
                await engine.sleep(3)
            except ConfigError as error:
                errors.append(error)

        group.start_soon(refused)
        group.start_soon(engine.sleep, 2)
        await anyio.wait_all_tasks_blocked()
        assert errors
        executor.between.set()
        await anyio.wait_all_tasks_blocked()
        assert executor.levels == [2, 2]
        assert engine.asleep
        await engine.wake_up()


async def test_who_has_it_sleep_while_it_wakes_comes_later() -> None:
    async with fake_engine() as (engine, executor), anyio.create_task_group() as group:
        await engine.sleep()
        executor.rpc_gate = anyio.Event()
        group.start_soon(engine.wake_up)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(engine.sleep)
        await anyio.wait_all_tasks_blocked()
        executor.rpc_gate.set()
        await anyio.wait_all_tasks_blocked()
        assert [rpc[0] for rpc in executor.rpcs] == ["sleep", "wake_up", "sleep"]
        assert engine.asleep
        await engine.wake_up()
