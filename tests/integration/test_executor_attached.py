"""Workers that somebody else has started: engines attach to them one after another, and they stay."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
import zmq
from processes import content
from scripted_runner import Gate

from steploom import codec
from steploom.config import EngineConfig
from steploom.errors import ConfigError, EngineDead, WorkerDied
from steploom.executor import AttachedExecutor
from steploom.protocol import NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.worker.listening import FATAL, _hear
from steploom.worker.messages import Configure, ToWorker
from steploom.worker.process import LAST_WORDS

TESTS = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "steploom.worker", "--runner", "scripted_runner:make", "--listen"]


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w") / "worker"


@contextlib.contextmanager
def started(address: Path, *command: str, stderr: Any = None) -> Iterator[subprocess.Popen[str]]:
    """A worker that was started by hand, once it listens."""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    with subprocess.Popen([*(command or COMMAND), address], env=path, **pipes) as worker:
        try:
            assert worker.stdout is not None
            assert "listens at" in worker.stdout.readline()
            yield worker
        finally:
            worker.kill()


@pytest.fixture
def worker(address: Path) -> Iterator[subprocess.Popen[str]]:
    with started(address) as worker:
        yield worker


def mode(address: Path) -> int | None:
    """Who may use the socket."""
    return stat.S_IMODE(address.stat().st_mode) if address.exists() else None


@contextlib.asynccontextmanager
async def attached(address: Path, **config: Any) -> AsyncIterator[AttachedExecutor]:
    executor = AttachedExecutor.at(address)(EngineConfig(**config))
    await executor.start()
    try:
        yield executor
    finally:
        await executor.shutdown()


async def log(executor: AttachedExecutor) -> list[str]:
    return await executor.collective_rpc("log", unique_reply_rank=0)


async def test_one_engine_after_another_finds_the_worker_as_it_is(address: Path, worker: subprocess.Popen[str]) -> None:
    assert mode(address) == 0o600
    async with attached(address) as first:
        assert await first.collective_rpc("pid") == [worker.pid]
        new = NewRequest("left#0", DiffusionRequest("left behind"))
        await first.execute_step(SchedulerOutput(1, scheduled_new_reqs=[new]))
    assert worker.poll() is None
    async with attached(address) as second:
        said = await log(second)
        assert await second.collective_rpc("pid") == [worker.pid]
        assert "close" not in said, "the same configuration finds the runner as it was"
    async with attached(address, max_batch=3) as third:
        assert await log(third) == ["call log"], "another configuration has another runner"
    worker.send_signal(signal.SIGTERM)
    assert await anyio.to_thread.run_sync(worker.wait, 20) == 128 + signal.SIGTERM
    assert mode(address) is None


async def test_what_an_engine_leaves_behind_is_unwound(address: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    command = [*COMMAND[:-2], "remembering_runner:make", "--listen"]
    with started(address, *command):
        async with attached(address, model=f"note:{note}") as first:
            new = NewRequest("left#0", DiffusionRequest("left behind"))
            await first.execute_step(SchedulerOutput(1, scheduled_new_reqs=[new]))
            assert await first.collective_rpc("resident", unique_reply_rank=0) == ["left#0"]
        assert content(tmp_path) == [note], "and before the engine has closed"
        async with attached(address, model=f"note:{note}") as second:
            assert await second.collective_rpc("resident", unique_reply_rank=0) == []


def engine_code(address: Path, then: str) -> str:
    """A program that attaches to the worker, and does something with its ``executor`` then."""
    return (
        "import asyncio, os, signal\nfrom steploom.config import EngineConfig\n"
        "from steploom.executor import AttachedExecutor\nfrom steploom.protocol import SchedulerOutput\n"
        "async def main():\n"
        f"    executor = AttachedExecutor.at({str(address)!r})(EngineConfig())\n"
        "    await executor.start()\n"
        f"    {then}\n"
        "asyncio.run(main())"
    )


async def test_the_worker_outlives_an_engine_that_is_killed_in_a_tick(
    address: Path, worker: subprocess.Popen[str], gate: Gate
) -> None:
    held = f"await executor.execute_step(SchedulerOutput(1, batch_key='hold {gate.path}'))"
    engine = await anyio.to_thread.run_sync(subprocess.Popen, [sys.executable, "-c", engine_code(address, held)])
    with engine:
        await gate.reached()
        engine.kill()
    gate.open()
    async with attached(address) as other:
        assert await other.collective_rpc("pid") == [worker.pid]
        assert (await other.execute_step(SchedulerOutput(1))).tick == 1


async def test_a_killed_engines_socket_goes_with_it(
    address: Path, worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    beside = tmp_path / "steploom-of-somebody-else"
    beside.mkdir()
    killed = [sys.executable, "-c", engine_code(address, "os.kill(os.getpid(), signal.SIGKILL)")]
    await anyio.run_process(killed, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    async with attached(address):  # one at a time: the worker is through with the one before
        assert content(tmp_path) == [beside]


async def test_a_living_engine_that_hangs_up_keeps_its_folder(address: Path, worker: subprocess.Popen[str]) -> None:
    async with attached(address) as executor:
        folder = Path(executor._folder)
        for _ in range(2):
            assert executor.discard(WorkerDied(0, 1))
            await executor.recover()
            await executor.check_health()
            assert len(content(folder)) == 1


async def test_only_a_private_folders_socket_is_removed(address: Path, worker: subprocess.Popen[str]) -> None:
    code = (
        "import os, signal, socket, sys\n"
        "own = socket.socket(socket.AF_UNIX)\nown.bind(sys.argv[2])\n"
        "to = socket.socket(socket.AF_UNIX)\nto.connect(sys.argv[1])\n"
        "to.sendall(sys.argv[2].encode() + b'\\n')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    mine = address.parent / "socket-of-mine"
    await anyio.run_process([sys.executable, "-c", code, address, mine], check=False)
    async with attached(address):
        assert mine.is_socket()


async def test_a_second_engine_waits_for_its_turn(address: Path, worker: subprocess.Popen[str]) -> None:
    with pytest.raises(EngineDead, match=r"start_timeout_s=0\.3"):
        async with attached(address), attached(address, start_timeout_s=0.3):
            pass
    async with anyio.create_task_group() as group:
        turns: list[str] = []

        async def second() -> None:
            async with attached(address) as executor:
                await executor.check_health()
                turns.append("second")

        async with attached(address):
            group.start_soon(second)
            await anyio.wait_all_tasks_blocked()
            turns.append("first")
    assert turns == ["first", "second"]


async def test_its_death_is_told_and_the_next_one_is_attached_to(address: Path) -> None:
    with started(address) as worker:
        executor = AttachedExecutor.at(address)(EngineConfig())
        await executor.start()
        worker.kill()
        error = await executor.wait_failed()
        assert isinstance(error, WorkerDied)
        assert "has hung up" in str(error)
    assert executor.discard(error)
    with started(address) as another:  # where the socket of the one that was killed still lies
        await executor.recover()
        assert await executor.collective_rpc("pid") == [another.pid]
        await executor.shutdown()
        assert another.poll() is None


async def test_a_model_that_cannot_load_is_told_and_hurts_no_other_engine(
    address: Path, worker: subprocess.Popen[str]
) -> None:
    for _ in range(2):
        with pytest.raises(EngineDead, match=r"model='broken'.*OSError: no such weights"):
            async with attached(address, model="broken"):
                pass
    async with attached(address) as executor:
        await executor.check_health()


def test_a_refusal_is_announced_before_the_connection_ends(
    address: Path, worker: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Else an engine might take the end of the connection for the worker's death, while the reason is on its way."""
    mine = tmp_path_factory.mktemp("e") / "e"
    with zmq.Context() as context, context.socket(zmq.PAIR) as pair, socket.socket(socket.AF_UNIX) as engine:
        pair.linger = 0
        pair.bind(f"ipc://{mine}")
        engine.settimeout(20)
        engine.connect(str(address))
        engine.sendall(f"{mine}\n".encode())
        pair.send_multipart(codec.encode(ToWorker(Configure.of(EngineConfig(model="broken")))))
        assert engine.recv(16) == FATAL
        assert engine.recv(16) == b""


async def test_a_refusal_whose_reason_is_on_its_way_is_waited_for(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(address))
        somebody.listen()

        def refuse() -> None:
            connection, _ = somebody.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(FATAL)

        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, refuse)
            with pytest.raises(WorkerDied, match=f"exit code {LAST_WORDS}"):
                await AttachedExecutor.at(address)(EngineConfig()).start()


async def test_who_says_nothing_sensible_is_let_go(address: Path, worker: subprocess.Popen[str]) -> None:
    for said in (b"", b"/no/such/socket\n", b"\xff\n", b"x" * 5000, f"{address}\t{10**30}\n".encode()):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(address))
            with contextlib.suppress(BrokenPipeError):
                stranger.sendall(said)
    async with attached(address) as executor:
        await executor.check_health()


@pytest.mark.parametrize(
    ("limit", "taken"),
    [(-1, False), (0, False), (2**20 - 1, False), (2**20, True), (2**63 - 1, True), (2**63, False), ("9" * 4000, False),
     ("x", False), ("1e9", False)],
)  # fmt: skip
def test_only_a_limit_that_messages_can_have_is_taken(address: Path, limit: object, taken: bool) -> None:
    here, there = socket.socketpair()
    with here, there, socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(address))
        there.sendall(f"{address}\t{limit}\n".encode())
        assert _hear(here, 60.0) == ((str(address), limit) if taken else None)


async def test_whatever_goes_wrong_with_one_engine_the_model_stays(address: Path, tmp_path: Path) -> None:
    """A socket whose path the messages' socket cannot take, say."""
    said = tmp_path / "stderr"
    with said.open("w") as file, started(address, stderr=file), socket.socket(socket.AF_UNIX) as odd:
        name = f"e{'x' * 100}"
        with contextlib.chdir(address.parent):
            odd.bind(name)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(address))
            stranger.sendall(f"{address.parent}/{name}\n".encode())
            stranger.settimeout(20)
            assert stranger.recv(16) == b"", "it is let go"
        async with attached(address) as executor:
            await executor.check_health()
    assert "an engine that has connected is let go" in said.read_text()


def test_two_workers_cannot_listen_at_one_address(address: Path, worker: subprocess.Popen[str]) -> None:
    done = subprocess.run([*COMMAND, address], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "in use; give a path that is free" in done.stderr
    assert psutil.pid_exists(worker.pid)


async def test_an_address_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"AttachedExecutor\.at\(path\)"):
        await AttachedExecutor(EngineConfig()).start()


async def test_a_runner_that_cannot_be_unwound_is_told_of_and_replaced(address: Path, tmp_path: Path) -> None:
    note, said = tmp_path / "note", tmp_path / "stderr"
    command = [*COMMAND[:-2], "remembering_runner:stubborn", "--listen"]
    with said.open("w") as file, started(address, *command, stderr=file):
        async with attached(address, model=f"note:{note}") as first:
            new = NewRequest("left#0", DiffusionRequest("left behind"))
            await first.execute_step(SchedulerOutput(1, scheduled_new_reqs=[new]))
        async with attached(address, model=f"note:{note}") as second:
            assert await second.collective_rpc("resident", unique_reply_rank=0) == []
    assert "cannot be unwound" in said.read_text()
    assert "it will not go" in said.read_text()
