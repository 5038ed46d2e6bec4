"""The clock of a tick: what stops it, and what does not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from scripted_runner import Gate

from steploom.config import EngineConfig
from steploom.errors import TickTimeout
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.protocol import SchedulerOutput


class ScriptedProcess(MultiprocExecutor):
    runner = "scripted_runner:make"


class ScriptedThread(InprocExecutor):
    runner = "scripted_runner:make"


@pytest.fixture(params=[ScriptedProcess, ScriptedThread], ids=["mp", "inproc"])
def kind(request: pytest.FixtureRequest) -> type[DiffusionExecutor]:
    return request.param


@contextlib.asynccontextmanager
async def running(kind: type[DiffusionExecutor], **config: Any) -> AsyncIterator[DiffusionExecutor]:
    executor = kind(EngineConfig(**config))
    await executor.start()
    try:
        yield executor
    finally:
        await executor.shutdown()


def tick(number: int, script: str | None = None) -> SchedulerOutput:
    return SchedulerOutput(number, batch_key=script)


async def longer_than_a_tick_may_take() -> None:
    with anyio.move_on_after(1.2):
        await anyio.Event().wait()


async def test_a_tick_that_takes_too_long_raises(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind, tick_timeout_s=0.05) as executor:
        with pytest.raises(TickTimeout, match=r"tick 1 within 0\.05 s"):
            await executor.execute_step(tick(1, f"hold {gate.path}"))
        await gate.reached()
        gate.open()


async def test_warming_up_stops_the_clock_of_a_tick(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind, tick_timeout_s=1.0) as executor, anyio.create_task_group() as group:
        results: list[int] = []

        async def execute() -> None:
            results.append((await executor.execute_step(tick(1, f"warm {gate.path}"))).tick)

        group.start_soon(execute)
        await gate.reached()
        await longer_than_a_tick_may_take()
        gate.open()
    assert results == [1]


@pytest.mark.parametrize("ahead", [False, True])
async def test_calls_before_a_tick_stop_its_clock(kind: type[DiffusionExecutor], gate: Gate, ahead: bool) -> None:
    """Also one that is sent while the tick waits for another one to end, or for another call."""
    hold: Any = ("hold", None, (str(gate.path),))
    async with running(kind, tick_timeout_s=1.0) as executor, anyio.create_task_group() as group:
        if ahead:
            group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
            await gate.reached()
            group.start_soon(executor.execute_step, tick(2))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(executor.collective_rpc, *hold)
            await anyio.wait_all_tasks_blocked()
            gate.open()
        else:
            group.start_soon(executor.collective_rpc, *hold)
        await gate.reached()
        if not ahead:
            group.start_soon(executor.execute_step, tick(2))
            await anyio.wait_all_tasks_blocked()
        group.start_soon(executor.collective_rpc, *hold)
        await longer_than_a_tick_may_take()
        gate.open()
        await gate.reached()
        await longer_than_a_tick_may_take()
        gate.open()


@pytest.mark.parametrize("how", ["answered", "given up", "behind"])
async def test_other_calls_leave_it_alone(kind: type[DiffusionExecutor], gate: Gate, how: str) -> None:
    """Those that were answered, those that nobody waits for, and those that wait for the tick."""
    async with running(kind, tick_timeout_s=0.2) as executor, anyio.create_task_group() as group:

        async def late() -> None:
            with pytest.raises(TickTimeout, match="tick 1"):
                await executor.execute_step(tick(1, None if how == "given up" else f"hold {gate.path}"))
            gate.open()

        async def call() -> None:
            with contextlib.suppress(TimeoutError):
                await executor.collective_rpc("hold", 0.1 if how == "given up" else None, (str(gate.path),))

        if how == "behind":
            group.start_soon(late)
            await gate.reached()
            assert await executor.collective_rpc("ping") == ["pong"]
            return
        group.start_soon(call)
        await gate.reached()
        group.start_soon(late)
        await anyio.wait_all_tasks_blocked()
        if how == "answered":
            gate.open()
            await gate.reached()
