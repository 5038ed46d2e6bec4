"""The clock of a tick: what stops it, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from scripted_runner import Gate

from steploom.config import EngineConfig
from steploom.errors import EngineError, TickTimeout
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.protocol import SchedulerOutput


class ScriptedProcess(MultiprocExecutor):
    runner = "scripted_runner:make"


class ScriptedThread(InprocExecutor):
    runner = "scripted_runner:make"


@pytest.fixture(params=[ScriptedProcess, pytest.param(ScriptedThread, marks=pytest.mark.slow)], ids=["mp", "inproc"])
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


@contextlib.asynccontextmanager
async def answered(executor: DiffusionExecutor, script: str) -> AsyncIterator[None]:
    """A tick that is under way within, and is answered after that."""
    results: list[int] = []

    async def execute() -> None:
        results.append((await executor.execute_step(tick(1, script))).tick)

    async with anyio.create_task_group() as group:
        group.start_soon(execute)
        yield
    assert results == [1]


@pytest.mark.slow
async def test_a_loop_that_stood_still_gives_the_tick_its_time_anew(kind: type[DiffusionExecutor], gate: Gate) -> None:
    """Stopped, or blocked by the application, for longer than a tick may take: the worker is not to blame."""
    async with running(kind, tick_timeout_s=1.0) as executor, answered(executor, f"hold {gate.path}"):
        await gate.reached()
        threading.Event().wait(2.0)  # the loop stands still
        await anyio.wait_all_tasks_blocked()
        gate.open()


async def test_warming_up_stops_the_clock_of_a_tick(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind, tick_timeout_s=1.0) as executor, answered(executor, f"warm {gate.path}"):
        await gate.reached()
        await longer_than_a_tick_may_take()
        gate.open()


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True])
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
            with pytest.raises(TickTimeout, match="tick 1"):  # the worker is lost, and so is what waits for it
                await executor.collective_rpc("ping")
            return
        group.start_soon(call)
        await gate.reached()
        group.start_soon(late)
        await anyio.wait_all_tasks_blocked()
        if how == "answered":
            gate.open()
            await gate.reached()


async def test_a_call_that_nobody_bounds_has_a_clock(kind: type[DiffusionExecutor], gate: Gate) -> None:
    """The worker is lost then, and so is all that waits behind the call."""
    async with running(kind, tick_timeout_s=0.1, call_timeout_s=0.2) as executor, anyio.create_task_group() as group:

        async def lost(call: Any, *arguments: Any) -> None:
            with pytest.raises(TickTimeout, match=r"did not answer hold\(\) within 0\.2 s"):
                await call(*arguments)

        group.start_soon(lost, executor.collective_rpc, "hold", None, (str(gate.path),))
        await gate.reached()
        group.start_soon(lost, executor.execute_step, tick(1))
        group.start_soon(lost, executor.collective_rpc, "ping", 60)
        assert isinstance(await executor.wait_failed(), TickTimeout)
        gate.open()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["tick", "call", "nothing"])
async def test_a_call_has_its_time_when_its_turn_has_come(
    kind: type[DiffusionExecutor], gate: Gate, before: str
) -> None:
    """And where the caller gives a time, that counts alone."""
    async with running(kind, call_timeout_s=1.0) as executor, anyio.create_task_group() as group:
        if before == "tick":
            group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
        else:
            group.start_soon(executor.collective_rpc, "hold", 60, (str(gate.path),))
        await gate.reached()
        if before != "nothing":
            group.start_soon(executor.collective_rpc, "ping")
        await longer_than_a_tick_may_take()
        gate.open()


async def test_warming_up_stops_the_clock_of_a_call(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind, call_timeout_s=1.0) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.collective_rpc, "warm", None, (str(gate.path),))
        await gate.reached()
        await longer_than_a_tick_may_take()
        gate.open()


async def test_what_waits_behind_a_call_leaves_its_clock_alone(kind: type[DiffusionExecutor], gate: Gate) -> None:
    """Probes that come and are given up, and ticks: else it would never run down."""
    async with running(kind) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.collective_rpc, "hold", None, (str(gate.path),))
        await gate.reached()
        assert isinstance(executor, ScriptedProcess | ScriptedThread)
        clock = executor._channels[0]._clock
        assert clock is not None
        for number in (1, 2):
            with pytest.raises(TimeoutError):
                await executor.collective_rpc("ping", 0.01)
            group.start_soon(executor.execute_step, tick(number))
            await anyio.wait_all_tasks_blocked()
        assert executor._channels[0]._clock is clock
        assert not clock.cancelled()
        gate.open()


async def test_a_call_that_may_have_crossed_with_a_tick_has_the_time_of_both(
    kind: type[DiffusionExecutor], gate: Gate
) -> None:
    """The worker may have begun with the second tick when the call came, before the first one's answer was here."""
    async with running(kind, call_timeout_s=0.1) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
        await gate.reached()
        group.start_soon(executor.execute_step, tick(2, f"hold {gate.path}"))
        await anyio.wait_all_tasks_blocked()
        assert isinstance(executor, ScriptedProcess | ScriptedThread)
        channel = executor._channels[0]
        channel.call(await channel.prepared("hold", [str(gate.path)], {}), 0.1)
        before = channel._clock
        gate.open()
        while len(channel._ticks) == 2:
            await anyio.lowlevel.checkpoint()
        assert channel._clock is not None
        assert channel._clock is not before
        assert channel._clock.when() - asyncio.get_running_loop().time() > 100
        for _ in ("the call", "the second tick"):
            await gate.reached()
            gate.open()


async def test_a_worker_is_well_though_it_is_busy(kind: type[DiffusionExecutor], gate: Gate) -> None:
    """Whoever asks learns that it does not answer; it is not lost by that."""
    async with running(kind, tick_timeout_s=0.2) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.collective_rpc, "hold", 60, (str(gate.path),))
        await gate.reached()
        with pytest.raises(EngineError, match=r"is busy, and did not answer within twice tick_timeout_s=0\.2"):
            await executor.check_health()
        gate.open()
        assert await executor.collective_rpc("ping") == ["pong"]
