"""An attached worker that is lost: that is always seen, and the next one is waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import zmq
from mortal_site import Witness, expected
from scripted_runner import Gate
from test_executor_attached import COMMAND, attached, started

from steploom import AsyncDiffusionEngine
from steploom.config import EngineConfig
from steploom.errors import EngineDead, WorkerDied
from steploom.executor import AttachedExecutor
from steploom.executor import attached as attachment
from steploom.executor.process import WorkerProcess
from steploom.executor.ray import Actor
from steploom.executor.ray_cluster import Cluster
from steploom.executor.transport import WorkerSocket
from steploom.executor.worker import Worker
from steploom.protocol import SchedulerOutput
from steploom.worker.listening import GREET_S, Keeper, _attend
from steploom.worker.messages import Progress
from steploom.worker.process import LAST_WORDS, EngineGone, EngineLink

MORTAL = [*COMMAND[:-2], "mortal_runner:make", "--listen"]
LOOKS = 8
"""How often a worker that has not come back yet is looked for, before it comes."""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")


@contextlib.contextmanager
def worker_of(process: WorkerProcess, address: Path, last_words_s: float = 3600.0) -> Iterator[Worker]:
    """A worker, at the other end of whose socket is nobody."""
    with zmq.Context() as context:
        config = EngineConfig(last_words_timeout_s=last_words_s)
        worker = Worker(0, config, process, partial(WorkerSocket, context, str(address)))
        try:
            yield worker
        finally:
            worker.abandon()


async def test_a_loss_that_is_met_by_sending_is_told(folder: Path) -> None:
    """The messages' socket may be gone before the connection's end is heard."""
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(folder / "w"))
        somebody.listen()
        process = attachment._Elsewhere(0, str(folder / "e"), str(folder / "w"))
        with worker_of(process, folder / "e") as worker:
            await worker.start()
            answer = worker.channel.tick(SchedulerOutput(1))  # nobody takes it
            with anyio.fail_after(20), pytest.raises(WorkerDied, match="has hung up"):
                await answer
            assert worker.channel.failed.is_set()


async def test_a_loss_that_nobody_tells_is_told_all_the_same(folder: Path) -> None:
    """An actor whose place is given back already cannot be ended once more, and Ray need not say that it is gone."""
    actor = Actor(0, Cluster(EngineConfig()), {}, "mortal_runner:make")
    with worker_of(actor, folder / "e", 0.01) as worker:
        answer = worker.channel.tick(SchedulerOutput(1))
        with anyio.fail_after(20), pytest.raises(WorkerDied):
            await answer


def test_a_worker_is_not_held_up_by_an_engine_that_is_gone_whatever_it_has_to_say(folder: Path) -> None:
    mine, its = socket.socketpair()
    with zmq.Context() as context, its:
        there = context.socket(zmq.PAIR)
        there.bind(f"ipc://{folder / 'e'}")
        link = EngineLink(str(folder / "e"), its.fileno())
        link.send(Progress("here"))
        there.recv_multipart()
        there.close(0)
        mine.close()
        keeper = Keeper("nothing:make")
        keeper._link = link
        for _ in range(5000):
            keeper._tell("loading on")
        with pytest.raises(EngineGone):
            link.send(Progress("loaded"))
        link.close()


def unheard(worker: Worker) -> None:
    """What is sent to it is not taken."""
    worker.channel.tick(SchedulerOutput(1)).cancel()


def ended(worker: Worker) -> None:
    """It has ended, and was to say why."""
    worker.process.exitcode = LAST_WORDS
    worker._exited()


@pytest.mark.parametrize("lose", [unheard, Worker._cut, ended])
async def test_last_words_may_be_on_their_way_for_as_long_as_is_set(folder: Path, lose: Callable[..., None]) -> None:
    """Who waits longer is lost first, and not given up when the other one is."""
    with (
        worker_of(WorkerProcess(0, "", "", print), folder / "p", 3600.0) as patient,
        worker_of(WorkerProcess(0, "", "", print), folder / "h", 0.01) as hasty,
    ):
        lose(patient)
        lose(hasty)
        with anyio.fail_after(20):
            await hasty.channel.failed.wait()
        assert not patient.channel.failed.is_set()


async def test_a_worker_that_takes_its_time_to_come_back_is_waited_for(
    folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nobody listens yet is no start that failed."""
    model, address, witness, enough = folder / "model", folder / "worker", Witness(), anyio.Event()
    model.write_text("")
    looks = look_often(enough, monkeypatch)
    engine = AsyncDiffusionEngine(
        model=str(model), distributed_executor_backend=AttachedExecutor.at(address), max_retries=1,
        restart_backoff_s=0.001, costs_file=None,
    )  # fmt: skip
    engine.observers.append(witness)
    outputs: list[object] = []

    async def ask() -> None:
        asked = {"num_inference_steps": 6, "gate": str(gate.path)}
        outputs.append((await engine.generate("a", seed=1, **asked)).output)

    with started(address, *MORTAL) as worker, contextlib.ExitStack() as later:
        async with engine, anyio.create_task_group() as group:
            group.start_soon(ask)
            await gate.reached()
            gate.close()
            worker.kill()
            await enough.wait()
            later.enter_context(started(address, *MORTAL))
    assert outputs == [expected("a")]
    assert len(looks) > LOOKS
    assert witness.recovered == len(witness.faults) == 1


def look_often(enough: anyio.Event, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an attached worker looked for more often; sets ``enough`` when it was, in vain."""
    monkeypatch.setattr(attachment, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(attachment, "LONGEST_WAIT_S", 0.01)
    looks: list[int] = []
    spawn = attachment._Elsewhere.spawn

    def look(process: attachment._Elsewhere) -> None:
        looks.append(process.rank)
        if len(looks) == LOOKS:
            anyio.from_thread.run_sync(enough.set)
        spawn(process)

    monkeypatch.setattr(attachment._Elsewhere, "spawn", look)
    return looks


@contextlib.asynccontextmanager
async def lost(address: Path) -> AsyncIterator[AttachedExecutor]:
    """An executor whose worker is gone."""
    with started(address) as worker:
        async with attached(address) as executor:
            worker.kill()
            assert executor.discard(await executor.wait_failed())
            yield executor


async def test_a_worker_that_never_comes_back_is_waited_for_as_long_as_a_start_may_take(folder: Path) -> None:
    async with lost(folder / "worker") as executor:
        executor.config = dataclasses.replace(executor.config, start_timeout_s=0.3)
        begun = anyio.current_time()
        with pytest.raises(EngineDead, match=r"no worker listens at .*python -m steploom\.worker --listen"):
            await executor.recover()
        assert 0.3 <= anyio.current_time() - begun < 5


async def test_the_door_of_a_worker_that_is_dying_is_no_start_that_failed(folder: Path) -> None:
    address = folder / "worker"
    async with lost(address) as executor:
        executor.config = dataclasses.replace(executor.config, start_timeout_s=1.0)
        address.unlink()
        dying = socket.socket(socket.AF_UNIX)
        dying.bind(str(address))
        dying.listen()

        def die() -> None:
            connection, _ = dying.accept()
            dying.close()
            connection.close()

        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, die)
            with pytest.raises(EngineDead, match="no worker listens"):
                await executor.recover()


async def test_what_does_not_pass_is_not_waited_for(folder: Path) -> None:
    address = folder / "worker"
    async with lost(address) as executor:
        address.unlink()
        address.symlink_to(address)
        with anyio.fail_after(20), pytest.raises(EngineDead, match="symbolic links"):
            await executor.recover()


async def test_a_first_start_does_not_wait(folder: Path) -> None:
    with anyio.fail_after(20), pytest.raises(EngineDead, match="no worker listens"):
        await AttachedExecutor.at(folder / "worker")(EngineConfig()).start()


KILLED_IN_THE_QUEUE = """
import socket, sys
socket.socket(socket.AF_UNIX).bind(sys.argv[2])
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
door.sendall(sys.argv[2].encode() + b"\\n")
"""


def test_an_engine_that_is_gone_when_its_turn_comes_leaves_nothing_behind(folder: Path) -> None:
    left = folder / "steploom-engine"
    left.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "w"))
        listener.listen()
        line = [sys.executable, "-I", "-S", "-c", KILLED_IN_THE_QUEUE, str(folder / "w"), str(left / "worker-0")]
        subprocess.run(line, check=True)
        assert (left / "worker-0").is_socket()
        connection, _ = listener.accept()
        with connection:
            _attend(connection, Keeper("nothing:make"), GREET_S)
    assert not left.exists()
