"""Faults of real processes: whatever dies, hangs or talks nonsense, somebody is told and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
from processes import content, gone
from scripted_runner import Gate

from steploom.config import EngineConfig
from steploom.errors import InvalidRequest, ProtocolError, WorkerDied
from steploom.executor import InprocExecutor, MultiprocExecutor, process
from steploom.protocol import NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.worker.messages import Hello

pytestmark = pytest.mark.usefixtures("temporary")

TESTS = Path(__file__).parents[1]


class Scripted(MultiprocExecutor):
    runner = "scripted_runner:make"


@pytest.fixture
async def executor(temporary: Path) -> AsyncIterator[Scripted]:
    executor = Scripted(EngineConfig())
    await executor.start()
    yield executor
    await executor.shutdown()
    assert content(temporary) == []


async def worker_of(executor: Scripted) -> psutil.Process:
    return psutil.Process(await executor.collective_rpc("pid", unique_reply_rank=0))


def before(gate: Gate, word: str = "hold") -> SchedulerOutput:
    """A tick that does not end before the gate is opened."""
    return SchedulerOutput(1, batch_key=f"{word} {gate.path}")


async def test_a_killed_idle_worker_is_seen_at_once(executor: Scripted) -> None:
    worker = await worker_of(executor)
    worker.kill()
    error = await executor.wait_failed()
    assert isinstance(error, WorkerDied)
    assert (error.rank, error.exitcode) == (0, -signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await executor.execute_step(SchedulerOutput(1))
    with pytest.raises(WorkerDied):
        await executor.check_health()


async def test_a_worker_killed_in_a_tick_fails_all_who_wait(executor: Scripted, gate: Gate) -> None:
    worker = await worker_of(executor)
    errors: list[WorkerDied] = []

    async def fails(call: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(WorkerDied) as caught:
            await call(*arguments)
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(fails, executor.execute_step, before(gate))
        await gate.reached()
        group.start_soon(fails, executor.execute_step, SchedulerOutput(2))
        group.start_soon(fails, executor.collective_rpc, "ping")
        await anyio.wait_all_tasks_blocked()
        worker.kill()
    assert len({id(error) for error in errors}) == 3  # one each: raising the same one twice mixes up tracebacks


async def test_last_words_of_a_worker_that_leaves_are_kept(executor: Scripted) -> None:
    with pytest.raises(WorkerDied, match="about to leave") as caught:
        await executor.execute_step(SchedulerOutput(1, batch_key="exit 3"))
    assert caught.value.exitcode == 3


async def test_death_is_seen_without_pidfds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    executor = Scripted(EngineConfig())
    await executor.start()
    try:
        (await worker_of(executor)).kill()
        error = await executor.wait_failed()
        assert isinstance(error, WorkerDied)
        assert error.exitcode == -signal.SIGKILL
    finally:
        await executor.shutdown()


async def test_what_a_worker_has_started_ends_with_it(executor: Scripted) -> None:
    child = psutil.Process(await executor.collective_rpc("child", unique_reply_rank=0))
    (await worker_of(executor)).kill()
    await executor.wait_failed()
    await gone(child)


@pytest.mark.parametrize("word", ["hold", "hang"])
async def test_a_worker_that_does_not_listen_is_ended(gate: Gate, word: str, temporary: Path) -> None:
    executor = Scripted(EngineConfig(stop_timeout_s=0.1, kill_timeout_s=0.1))
    await executor.start()
    assert executor._workers[0].process.kill_timeout_s == 0.1
    worker = await worker_of(executor)
    async with anyio.create_task_group() as group:
        group.start_soon(executor.execute_step, before(gate, word))
        await gate.reached()
        group.cancel_scope.cancel()
    await executor.shutdown()
    assert not worker.is_running()
    assert executor._workers[0].process.exitcode == -(signal.SIGTERM if word == "hold" else signal.SIGKILL)


async def test_a_worker_that_listens_unwinds_its_programs(executor: Scripted) -> None:
    await executor.shutdown()
    assert executor._workers[0].process.exitcode == 0


async def test_a_request_that_cannot_travel_fails_alone(executor: Scripted) -> None:
    new = [
        NewRequest("bad#0", DiffusionRequest("a", callback_on_step_end=lambda: None)),
        NewRequest("good#0", DiffusionRequest("a", image=b"image")),
    ]
    answer = await executor.execute_step(SchedulerOutput(1, new))
    good, bad = answer.reports
    assert (good.run_id, good.output, good.error) == ("good#0", b"image", None)
    assert bad.finished
    assert bad.error is not None
    error = bad.error.exception()
    assert isinstance(error, InvalidRequest)
    assert error.field == "callback_on_step_end"
    assert "params['callback_on_step_end']: a function cannot travel" in str(error)


async def test_an_output_that_cannot_travel_fails_alone(executor: Scripted) -> None:
    new = [NewRequest(f"{name}#0", DiffusionRequest("a")) for name in ("bad", "good")]
    await executor.execute_step(SchedulerOutput(1, new))
    answer = await executor.execute_step(SchedulerOutput(2, [], ["bad#0", "good#0"], batch_key="unfit bad#0"))
    bad, good = answer.reports
    assert bad.finished
    assert bad.error is not None
    assert "cannot travel" in bad.error.message
    assert (good.output, good.error) == ("fit", None)
    with pytest.raises(InvalidRequest, match="result: a function cannot travel"):
        await executor.collective_rpc("function")


async def test_a_damaged_message_to_the_engine_is_a_protocol_error(executor: Scripted, gate: Gate) -> None:
    worker = await worker_of(executor)

    async def fails() -> None:
        with pytest.raises(ProtocolError, match="worker 0: a message cannot be decoded"):
            await executor.execute_step(before(gate))

    async with anyio.create_task_group() as group:
        group.start_soon(fails)
        await gate.reached()
        socket = executor._workers[0].socket
        socket._deliver(socket._decode([memoryview(b"\xc1 nonsense")]))
    assert isinstance(await executor.wait_failed(), ProtocolError)
    await gone(worker)


async def test_a_damaged_message_to_the_worker_is_a_protocol_error(executor: Scripted) -> None:
    executor._workers[0].socket._socket.send_multipart([b"\xc1 nonsense"])
    error = await executor.wait_failed()
    assert isinstance(error, ProtocolError)
    assert "a message cannot be decoded" in str(error)


async def test_another_version_of_the_protocol_is_refused(executor: Scripted) -> None:
    executor._channels[0].receive(Hello(version=999))
    with pytest.raises(ProtocolError, match="worker 0 speaks protocol version 999"):
        await executor.execute_step(SchedulerOutput(1))


async def test_a_worker_that_cannot_even_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('not that zmq')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerDied, match="not that zmq"):
        await Scripted(EngineConfig()).start()


@pytest.mark.parametrize("spawned", [False, True])
async def test_a_start_that_is_cancelled_from_outside_of_anyio_leaves_no_process(
    spawned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop does that ends: ``Task.cancel`` reaches even what is shielded, and the spawn goes on in its thread."""
    others = set(psutil.Process().children(recursive=True))
    executor, began, release, done = Scripted(EngineConfig()), anyio.Event(), threading.Event(), anyio.Event()
    spawn, loop = process.WorkerProcess.spawn, asyncio.get_running_loop()

    def slowly(self: process.WorkerProcess) -> None:
        if spawned:
            spawn(self)
        loop.call_soon_threadsafe(began.set)
        release.wait()
        if not spawned:
            spawn(self)
        loop.call_soon_threadsafe(done.set)

    monkeypatch.setattr(process.WorkerProcess, "spawn", slowly)
    starting = loop.create_task(executor.start())
    await began.wait()
    starting.cancel()
    with anyio.fail_after(30):
        with pytest.raises(asyncio.CancelledError):
            await starting
        await executor.shutdown()
        release.set()
        await done.wait()
    assert set(psutil.Process().children(recursive=True)) <= others


async def test_the_socket_is_private_and_the_command_line_tells_nothing(temporary: Path) -> None:
    executor = Scripted(EngineConfig(model="secret-model"))
    await executor.start()
    (folder,) = content(temporary)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    worker = await worker_of(executor)
    assert not any("secret" in part for part in [*worker.cmdline(), *worker.environ().values()])
    assert os.getsid(worker.pid) == worker.pid
    await executor.shutdown()


async def test_no_library_is_loaded_before_it_is_needed(executor: Scripted) -> None:
    modules = set(await executor.collective_rpc("modules", unique_reply_rank=0))
    assert not modules & {"torch", "numpy", "PIL", "diffusers", "pickle5"}


async def test_the_worker_ignores_ctrl_c(executor: Scripted) -> None:
    (await worker_of(executor)).send_signal(signal.SIGINT)
    assert await executor.collective_rpc("ping") == ["pong"]


def test_it_works_in_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> list[Any]:
        executor = Scripted(EngineConfig())
        await executor.start()
        try:
            await asyncio.gather(*(executor.execute_step(SchedulerOutput(number)) for number in range(1, 50)))
            return await executor.collective_rpc("echo", args=(b"1" * 1_000_000,))
        finally:
            await executor.shutdown()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ((args, _),) = runner.run(main())
    assert len(args[0]) == 1_000_000


async def test_many_ticks_and_large_messages(executor: Scripted) -> None:
    """Two in flight all the time, payloads among them: no message is lost, swapped or stuck."""
    payload = os.urandom(300_000)

    async def ticks() -> None:
        for number in range(1, 200):
            new = [NewRequest(f"{number}#0", DiffusionRequest("a", image=payload))] if number % 10 == 0 else []
            answer = await executor.execute_step(SchedulerOutput(number, new))
            assert [report.output for report in answer.reports] == [payload] * len(new)

    async def calls() -> None:
        for number in range(100):
            assert (await executor.collective_rpc("echo", args=(number, payload)))[0][0] == (number, payload)

    async with anyio.create_task_group() as group:
        group.start_soon(ticks)
        group.start_soon(calls)


async def test_a_thread_that_does_not_end_in_time_is_left_to_itself(
    gate: Gate, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = ScriptedThread(EngineConfig(stop_timeout_s=0.1))
    await executor.start()
    async with anyio.create_task_group() as group:
        group.start_soon(executor.execute_step, before(gate))
        await gate.reached()
        group.cancel_scope.cancel()
    await executor.shutdown()
    assert "still works after 0.1 s" in caplog.text
    gate.open()
    assert executor._thread is not None
    await anyio.to_thread.run_sync(executor._thread.join)


class ScriptedThread(InprocExecutor):
    runner = "scripted_runner:make"
