"""Calls with long arguments: they are written beside the event loop."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest

from steploom.config import EngineConfig
from steploom.errors import EngineNotRunning, InvalidRequest
from steploom.executor import MultiprocExecutor
from steploom.executor.transport import WorkerSocket
from steploom.worker.messages import Call

pytestmark = pytest.mark.usefixtures("temporary")
LONG = [[float(index), str(index)] for index in range(5000)]


class Scripted(MultiprocExecutor):
    runner = "scripted_runner:make"


class Writing:
    """Where commands are written; those in a thread wait until they may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.may, self.begun = threading.Event(), threading.Semaphore(0)
        write = WorkerSocket.write

        def noting(socket: WorkerSocket, command: Any) -> Any:
            beside = threading.current_thread() is not threading.main_thread()
            if isinstance(command, Call):
                self.calls.append((command.method, beside))
            if beside:
                self.begun.release()
                assert self.may.wait(20)
            return write(socket, command)

        monkeypatch.setattr(WorkerSocket, "write", noting)


async def test_long_arguments_are_written_in_a_thread_and_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Writing(monkeypatch)
    executor = Scripted(EngineConfig(data_parallel_size=2))
    await executor.start()
    answers: list[Any] = []

    async def echo() -> None:
        answers.extend(await executor.collective_rpc("echo", args=(LONG,), kwargs={"more": LONG}))

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(echo)
            await anyio.wait_all_tasks_blocked()
            assert await executor.collective_rpc("ping") == ["pong", "pong"]
            writing.may.set()
        assert answers == [((LONG,), {"more": LONG})] * 2
        assert writing.calls == [("echo", True), ("ping", False), ("ping", False), ("echo", True)]
        with pytest.raises(InvalidRequest, match=r"args\[0\]\[5000\]: an object of type"):
            await executor.collective_rpc("echo", args=([*LONG, object()],))
        assert await executor.collective_rpc("ping") == ["pong", "pong"]
    finally:
        await executor.shutdown()


async def test_who_leaves_while_they_are_written_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Writing(monkeypatch)
    executor = Scripted(EngineConfig(data_parallel_size=2))
    await executor.start()
    try:
        with pytest.raises(TimeoutError):
            await executor.collective_rpc("echo", 0.01, (LONG,))
        async with anyio.create_task_group() as group:

            async def late() -> None:
                with pytest.raises(EngineNotRunning):
                    await executor.collective_rpc("echo", args=(LONG,))

            group.start_soon(late)
            await anyio.wait_all_tasks_blocked()
            await executor.remove_worker()
            writing.may.set()
        assert await executor.collective_rpc("ping") == ["pong"]
    finally:
        writing.may.set()
        await executor.shutdown()
