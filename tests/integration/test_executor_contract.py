"""What every executor owes the engine, checked on a worker process and on a thread, with a scripted runner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from scripted_runner import Gate

from steploom.config import EngineConfig
from steploom.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
)
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor, RayExecutor, resolve_executor
from steploom.protocol import NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest


class ScriptedProcess(MultiprocExecutor):
    runner = "scripted_runner:make"


class ScriptedThread(InprocExecutor):
    runner = "scripted_runner:make"


@pytest.fixture(params=[ScriptedProcess, ScriptedThread], ids=["mp", "inproc"])
def kind(request: pytest.FixtureRequest) -> type[DiffusionExecutor]:
    return request.param


@asynccontextmanager
async def running(kind: type[DiffusionExecutor], **config: Any) -> AsyncIterator[DiffusionExecutor]:
    executor = kind(EngineConfig(**config))
    await executor.start()
    try:
        yield executor
    finally:
        await executor.shutdown()


def tick(number: int, script: str | None = None, *requests: DiffusionRequest) -> SchedulerOutput:
    new = [NewRequest(f"{request.request_id}#0", request) for request in requests]
    return SchedulerOutput(number, scheduled_new_reqs=new, batch_key=script)


async def test_ticks_and_calls_are_answered(kind: type[DiffusionExecutor]) -> None:
    lines: list[str] = []
    executor = kind(EngineConfig())
    info = await executor.start(lines.append)
    try:
        assert (info.pipeline_class, info.in_process) == ("Scripted", kind is ScriptedThread)
        assert lines == ["loading demo"]
        assert (await executor.execute_step(tick(1))).tick == 1
        assert await executor.collective_rpc("echo", args=(1, (2,)), kwargs={"a": b"b"}) == [((1, (2,)), {"a": b"b"})]
        assert await executor.collective_rpc("ping", unique_reply_rank=0) == "pong"
        await executor.check_health()
        await executor.sleep(2)
        await executor.wake_up()
        assert (await executor.collective_rpc("log", unique_reply_rank=0))[-5:-1] == [
            "call sleep", "sleep 2", "call wake_up", "wake_up",
        ]  # fmt: skip
    finally:
        await executor.shutdown()


async def test_progress_is_told_from_the_first_line_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a worker says while this process still imports."""
    heard = anyio.Event()
    monkeypatch.setattr("steploom.executor.multiproc._import_what_answers_hold", heard.wait)
    executor = ScriptedProcess(EngineConfig(start_timeout_s=20))
    await executor.start(lambda line: heard.set())
    await executor.shutdown()


async def test_two_ticks_in_flight_are_answered_in_order(kind: type[DiffusionExecutor], gate: Gate) -> None:
    answers: list[int] = []
    async with running(kind) as executor, anyio.create_task_group() as group:

        async def execute(number: int, script: str | None = None) -> None:
            answers.append((await executor.execute_step(tick(number, script))).tick)

        group.start_soon(execute, 1, f"hold {gate.path}")
        await gate.reached()
        group.start_soon(execute, 2)
        await anyio.wait_all_tasks_blocked()
        assert answers == []
        gate.open()
    assert answers == [1, 2]


@pytest.mark.alone  # a message takes its time to arrive, which nobody can wait for
async def test_a_call_in_a_long_tick_is_answered_before_the_next_tick(
    kind: type[DiffusionExecutor], gate: Gate
) -> None:
    async with running(kind) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
        await gate.reached()
        group.start_soon(executor.execute_step, tick(2))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(executor.collective_rpc, "ping")
        await anyio.wait_all_tasks_blocked()
        gate.open()
        assert (await executor.collective_rpc("log"))[0][:2] == ["tick 1", "call ping"]


async def test_a_call_that_nobody_waits_for_any_more_never_begins(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind) as executor, anyio.create_task_group() as group:
        group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
        await gate.reached()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await executor.collective_rpc("boom", timeout=0.01)
        gate.open()
        (log,) = await executor.collective_rpc("log")
        assert log.count("call boom") <= 1, "only the last withdrawal may still be on its way when the worker looks"


async def test_what_a_call_raises_comes_back(kind: type[DiffusionExecutor]) -> None:
    async with running(kind) as executor:
        with pytest.raises(GenerationFailed, match="ZeroDivisionError: as asked") as caught:
            await executor.collective_rpc("boom")
        assert "rpc_boom" in caught.value.remote_traceback
        assert await executor.collective_rpc("ping") == ["pong"]


CALLS = {
    "method": [None, 5, print, b"ping"],
    "args": ["ab", b"ab", 5, {1: 2}],
    "kwargs": [{1: 1}, [1], "ab"],
    "timeout": ["5", float("nan"), True, 10**400],
    "unique_reply_rank": [1, -1, "0", True, 0.0],
}


async def test_a_call_that_makes_no_sense_is_refused_and_hurts_nobody(kind: type[DiffusionExecutor]) -> None:
    """A message that the worker cannot read would end it, and with it every request."""
    async with running(kind) as executor:
        for name, values in CALLS.items():
            for value in values:
                with pytest.raises(InvalidRequest, match=f"^{name}=") as caught:
                    await executor.collective_rpc(**{"method": "ping", name: value})
                assert caught.value.field == name
        assert await executor.collective_rpc("echo", 5, (1, [2]), {"a": b"3"}, 0) == ((1, [2]), {"a": b"3"})


async def test_a_runner_that_raises_in_a_tick_is_the_engines_fault(kind: type[DiffusionExecutor]) -> None:
    async with running(kind) as executor:
        with pytest.raises(EngineDead, match="RuntimeError: out of luck"):
            await executor.execute_step(tick(1, "raise out of luck"))
        assert (await executor.execute_step(tick(2))).tick == 2


async def test_a_cancelled_tick_does_not_disturb_the_next(kind: type[DiffusionExecutor], gate: Gate) -> None:
    async with running(kind) as executor:
        async with anyio.create_task_group() as group:
            group.start_soon(executor.execute_step, tick(1, f"hold {gate.path}"))
            await gate.reached()
            group.cancel_scope.cancel()
        gate.open()
        assert (await executor.execute_step(tick(2))).tick == 2


async def test_a_model_that_cannot_load_fails_the_start_with_the_reason(kind: type[DiffusionExecutor]) -> None:
    executor = kind(EngineConfig(model="broken"))
    with pytest.raises(EngineDead, match=r"model='broken'.*OSError: no such weights"):
        await executor.start()
    with pytest.raises(EngineNotRunning):
        await executor.execute_step(tick(1))
    await executor.shutdown()


@pytest.mark.slow
async def test_a_start_that_takes_too_long_raises(kind: type[DiffusionExecutor], gate: Gate) -> None:
    executor = kind(EngineConfig(model=f"slow:{gate.path}", start_timeout_s=1.5))
    async with anyio.create_task_group() as group:
        if kind is ScriptedThread:  # it cannot be ended from outside: it ends when the model has loaded
            group.start_soon(_open_in, 1.6, gate)
        with pytest.raises(EngineDead, match=r"start_timeout_s=1.5"):
            await executor.start()


async def _open_in(seconds: float, gate: Gate) -> None:
    await gate.reached()
    with anyio.move_on_after(seconds):
        await anyio.Event().wait()
    gate.open()


async def test_shutdown_in_a_tick_ends_its_waiter_and_is_idempotent(kind: type[DiffusionExecutor], gate: Gate) -> None:
    executor = kind(EngineConfig())
    await executor.start()
    errors: list[Exception] = []

    async def execute() -> None:
        try:
            await executor.execute_step(tick(1, f"hold {gate.path}"))
        except EngineNotRunning as error:
            errors.append(error)
            gate.open()

    async with anyio.create_task_group() as group:
        group.start_soon(execute)
        await gate.reached()
        group.start_soon(executor.shutdown)
        await executor.shutdown()
    await executor.shutdown()
    assert len(errors) == 1
    with pytest.raises(EngineNotRunning):
        await executor.collective_rpc("ping")
    with pytest.raises(EngineNotRunning):
        await executor.start()


async def test_shutdown_without_a_start(kind: type[DiffusionExecutor]) -> None:
    await kind(EngineConfig()).shutdown()


async def test_two_executors_share_a_loop(kind: type[DiffusionExecutor]) -> None:
    async with running(kind) as one, running(kind) as other:
        assert (await other.execute_step(tick(7))).tick == 7
        assert (await one.execute_step(tick(3))).tick == 3
        assert (await one.collective_rpc("log"))[0] == ["tick 3", "call log"]


async def test_nothing_is_left(kind: type[DiffusionExecutor]) -> None:
    large = DiffusionRequest("a", image=b"1" * 100_000)
    async with running(
        kind
    ) as executor:  # the first one opens what stays: the loop's thread pool, ZMQ's garbage collector
        await executor.execute_step(tick(1, None, large))
    before = _held()
    async with running(kind) as executor:
        await executor.execute_step(tick(1, None, large))
    with anyio.move_on_after(60):
        while _held() - before and kind is ScriptedProcess:  # a thread of ZeroMQ closes its descriptors
            await anyio.lowlevel.checkpoint()
    assert _held() - before == set()


def _held() -> set[str]:
    """Descriptors, threads and tasks of this process, without the threads of pools that the loop keeps."""
    descriptors = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    threads = {f"{thread.name} {thread.ident}" for thread in threading.enumerate() if not _pooled(thread)}
    return descriptors | threads | {task.get_name() for task in asyncio.all_tasks()}


def _pooled(thread: threading.Thread) -> bool:
    return thread.name.startswith(("AnyIO worker thread", "asyncio_"))


def test_backends_are_resolved() -> None:
    def resolve(backend: Any) -> type[DiffusionExecutor]:
        return resolve_executor(EngineConfig(distributed_executor_backend=backend))

    assert resolve("mp") is MultiprocExecutor
    assert resolve("inproc") is InprocExecutor
    assert resolve("ray") is RayExecutor
    assert resolve(ScriptedThread) is ScriptedThread
    assert resolve("steploom.executor.uniproc.InprocExecutor") is InprocExecutor
    for backend, text in (
        ("threads", "does not import"),
        ("no.such.Module", "does not import.*No module named 'no'"),
        ("steploom.executor.Nothing", "does not import"),
        ("steploom.config.EngineConfig", "is no DiffusionExecutor"),
        (dict, "is no DiffusionExecutor"),
        (DiffusionExecutor, "does not implement _init_executor, collective_rpc, shutdown"),
    ):
        with pytest.raises(ConfigError, match=text):
            resolve(backend)


def test_one_worker_is_what_there_is_in_process() -> None:
    with pytest.raises(ConfigError, match="data_parallel_size=2"):
        ScriptedThread(EngineConfig(data_parallel_size=2))


async def test_an_executor_for_whole_requests_does_not_take_steps() -> None:
    class Whole(ScriptedThread):
        granularity = "request"
        execute_step = DiffusionExecutor.execute_step

    with pytest.raises(EngineError, match="does not execute steps"):
        await Whole(EngineConfig()).execute_step(tick(1))
