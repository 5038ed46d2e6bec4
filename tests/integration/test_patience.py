"""Time-outs that are settings: of two that differ in nothing else, the patient one begins first, and waits longer."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import pytest
import zmq
from mortal_site import Site
from scripted_runner import Gate, ScriptedRunner
from serving import listening
from test_executor_attached import COMMAND, TESTS, started

from steploom import codec
from steploom.config import EngineConfig
from steploom.errors import EngineDead
from steploom.executor import ray_cluster
from steploom.executor.ray import Actor
from steploom.executor.ray_cluster import Cluster
from steploom.server import create_app
from steploom.testing import FakeEngine
from steploom.worker.messages import Configure, Fatal, ToEngine, ToWorker
from steploom.worker.process import EngineLink, attend
from steploom.worker.ranks import spmd as ranks
from steploom.worker.ranks.group import Group

PATIENT_S, HASTY_S = 3600.0, 0.05


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


def begun(run: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that runs it, and what it has returned or raised by now."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(run())
        except Exception as error:  # noqa: BLE001 - it is the outcome
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, outcome


def over(thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive()


class Refusing:
    """Where a runner waits before it cannot be loaded."""

    def __init__(self) -> None:
        self.tried, self.may_fail = threading.Event(), threading.Event()


refusing: dict[str, Refusing] = {}


def refuse(config: EngineConfig, progress: Callable[[str], None]) -> ScriptedRunner:
    """A factory of runners."""
    refusing[config.model].tried.set()
    refusing[config.model].may_fail.wait(60)
    raise OSError("no such weights")


def test_a_worker_waits_until_its_last_words_have_left_for_as_long_as_is_set(folder: Path) -> None:
    """The engine is not there when they are sent. Whoever is patient gives them to the one that comes later."""
    workers: dict[str, threading.Thread] = {}
    with zmq.Context() as context:
        for name, seconds in (("patient", PATIENT_S), ("hasty", HASTY_S)):
            refusing[name] = Refusing()
            with bound(context, folder / name) as engine:
                link = EngineLink(str(folder / name))
                workers[name], _ = begun(lambda link=link: attend(link, f"{__name__}:refuse"))
                engine.recv_multipart()  # Hello
                config = EngineConfig(model=name, last_words_timeout_s=seconds)
                engine.send_multipart(codec.encode(ToWorker(Configure.of(config))))
                assert refusing[name].tried.wait(60)
        for one in refusing.values():
            one.may_fail.set()
        over(workers["hasty"])
        assert workers["patient"].is_alive()
        with bound(context, folder / "patient") as engine:
            answer = codec.decode(engine.recv_multipart(), ToEngine).answer
            assert isinstance(answer, Fatal)
            assert "no such weights" in answer.error.message
        over(workers["patient"])


@contextlib.contextmanager
def bound(context: zmq.Context[zmq.Socket[bytes]], address: Path) -> Iterator[zmq.Socket[bytes]]:
    """An engine's socket."""
    with context.socket(zmq.PAIR) as engine:
        engine.linger, engine.rcvtimeo = 0, 60_000
        engine.bind(f"ipc://{address}")
        yield engine


PATHS = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
TWO_GROUPS = """
import os, sys, threading
from steploom.config import EngineConfig
from steploom.worker.ranks import spmd as ranks
from steploom.worker.ranks.group import Group

def lose(why):
    print(threading.current_thread().name, "is told:", why, flush=True)
    os._exit(0)

def hear(link, seconds=None):
    try:
        return was(link, seconds)
    except EOFError:
        heard.set()
        raise

def group(name, seconds):
    config = EngineConfig(ulysses_degree=2, device="cpu", last_words_timeout_s=seconds)
    return Group(os.path.join(sys.argv[1], name), "lingering_runner:make", config, lambda line: None)

was, heard = ranks.Link.hear, threading.Event()
ranks.Link.hear, ranks.lose = hear, lose
patient, hasty = group("patient", float(sys.argv[2])), group("hasty", float(sys.argv[3]))
threading.Thread(target=patient.call, args=("hang_up", (), {}), name="patient", daemon=True).start()
heard.wait()
hasty.call("hang_up", (), {})
"""


def test_how_a_rank_has_ended_may_be_told_as_late_as_is_set(folder: Path) -> None:
    """It has hung up, and nobody tells: its worker is given up, in a process that can do without it."""
    command = [sys.executable, "-c", TWO_GROUPS, str(folder), str(PATIENT_S), str(HASTY_S)]
    own = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True, env=own)
    assert done.stdout == "MainThread is told: rank 1 is gone\n"


async def test_ranks_may_take_as_long_to_end_as_is_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_here", [])
    monkeypatch.setenv("PYTHONPATH", PATHS)
    gates = {seconds: Gate(tmp_path / f"gate{seconds}") for seconds in (PATIENT_S, HASTY_S)}
    groups: dict[float, Group] = {}
    for seconds, gate in gates.items():
        config = EngineConfig(model=str(gate.path), ulysses_degree=2, device="cpu", stop_timeout_s=seconds)
        groups[seconds] = Group(str(folder / f"store{seconds}"), "lingering_runner:make", config, print)
    patient, _ = begun(groups[PATIENT_S].close)
    await gates[PATIENT_S].reached()
    hasty, _ = begun(groups[HASTY_S].close)
    await anyio.to_thread.run_sync(over, hasty)
    assert patient.is_alive()
    gates[PATIENT_S].open()
    await anyio.to_thread.run_sync(over, patient)
    assert [groups[seconds]._processes[0].returncode for seconds in gates] == [0, -9]
    for seconds, group in groups.items():
        group._processes[0].communicate()  # closes what is left of it
        gates[seconds].close()


def test_a_cluster_may_take_as_long_to_answer_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address takes no more connections, until it is gone. Ray itself is not asked before it has answered."""
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setattr(ray_cluster._session, "_lock", contextlib.nullcontext())  # the two do not wait for each other
    with socket.socket() as full, contextlib.ExitStack() as clients:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        for _ in range(3):  # more than may wait
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, port))

        def join(seconds: float) -> None:
            Cluster(EngineConfig(ray_address=f"{host}:{port}", ray_reach_timeout_s=seconds)).join()

        patient, why = begun(lambda: join(PATIENT_S))
        with pytest.raises(EngineDead, match=r"nobody answers .*timed out"):
            join(HASTY_S)
        assert patient.is_alive()
        clients.close()
        full.close()
        over(patient)
        assert "refused" in str(why[0])


async def test_ray_may_take_as_long_to_say_that_an_actor_is_gone_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    gives_back: list[Actor] = []
    monkeypatch.setattr(Actor, "_let_go", lambda actor: gives_back.append(actor))
    patient, *hasty = actors()
    ended: list[Actor] = []

    async def end(actor: Actor) -> None:
        await actor.end(0.0)
        ended.append(actor)

    async with anyio.create_task_group() as group:
        group.start_soon(end, patient)
        await anyio.wait_all_tasks_blocked()
        for actor in hasty:  # in turn, so that half of the time would do for the patient one
            await end(actor)
        assert ended == hasty
        patient.exited.set()
    assert Counter(gives_back) == Counter([patient, *hasty]), "each once"


def actors() -> list[Actor]:
    """A patient one and two hasty ones that Ray has started, so they believe; it says nothing of their ends."""
    found: list[Actor] = []
    for seconds in (PATIENT_S, HASTY_S, HASTY_S):
        cluster = Cluster(EngineConfig(ray_gone_timeout_s=seconds))
        cluster.ray = SimpleNamespace(util=SimpleNamespace(remove_placement_group=lambda group: None))
        found.append(Actor(0, cluster, {}, ""))
        found[-1]._actor = object()
    return found


async def test_a_place_that_is_waited_for_is_given_back_within_what_is_set() -> None:
    patient, *hasty = actors()
    for actor in (patient, *hasty):
        actor._group = object()
        actor._waiting.clear()
    ends, _ = begun(patient._let_go)
    for actor in hasty:
        await anyio.to_thread.run_sync(actor._let_go)
    assert ends.is_alive()
    patient._waiting.set()
    over(ends)


def test_who_says_nothing_to_a_worker_is_let_go_when_it_is_set(folder: Path) -> None:
    def command(seconds: float) -> list[str]:
        return [*COMMAND[:-1], "--greet-timeout", str(seconds), "--listen"]

    with contextlib.ExitStack() as stack:
        strangers: list[socket.socket] = []
        for name, seconds in (("patient", PATIENT_S), ("hasty", HASTY_S)):
            stack.enter_context(started(folder / name, *command(seconds)))
            strangers.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        for stranger, name in zip(strangers, ("patient", "hasty"), strict=True):
            stranger.settimeout(60)
            stranger.connect(str(folder / name))
        patient, hasty = strangers
        assert hasty.recv(1) == b"", "it is let go"
        context = stack.enter_context(zmq.Context())
        engine = stack.enter_context(bound(context, folder / "engine"))
        patient.sendall(f"{folder / 'engine'}\n".encode())
        assert engine.recv_multipart(), "it is heard"


def test_who_dawdles_over_its_greeting_is_let_go_all_the_same(folder: Path) -> None:
    """A byte now and then is no greeting: the next engine waits meanwhile."""
    command = [*COMMAND[:-1], "--greet-timeout", str(2 * HASTY_S), "--listen"]
    with started(folder / "w", *command), socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(folder / "w"))
        stranger.settimeout(HASTY_S)

        def let_go() -> bool:
            try:
                stranger.send(b"x")
                return stranger.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        assert any(let_go() for _ in range(200))


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon"])
def test_a_worker_that_would_wait_for_nobody_does_not_start(folder: Path, given: str) -> None:
    command = [*COMMAND[:-1], "--greet-timeout", given, "--listen", str(folder / "w")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--greet-timeout" in done.stderr


@pytest.mark.parametrize("over_channel", [False, True])
async def test_a_silent_stream_says_that_it_lives_when_it_is_set(over_channel: bool) -> None:
    body = {"prompt": "a", "stream": True, "partial_images": 1}
    async with FakeEngine() as engine, contextlib.AsyncExitStack() as stack:
        engine.hold()
        lines: list[Any] = []
        for seconds in (PATIENT_S, HASTY_S):
            address = await stack.enter_async_context(listening(create_app(engine, stream_silence_s=seconds)))
            client = await stack.enter_async_context(httpx2.AsyncClient(base_url=f"{address}/v1/", timeout=60))
            asked = ("GET", "ticks?channel=c") if over_channel else ("POST", "images/generations")
            answer = client.stream(*asked, **({} if over_channel else {"json": body}))
            lines.append((await stack.enter_async_context(answer)).aiter_lines())
            if over_channel:
                head = {"steploom-channel": "c"}
                assert (await client.post("images/generations", json=body, headers=head)).status_code == 202
        patient, hasty = lines
        with anyio.fail_after(10):
            async for line in hasty:
                if line == ": still here":
                    break
        engine.release()
        with anyio.fail_after(60):
            async for line in patient:
                assert line != ": still here"
                if line.startswith("event: image_generation.completed"):
                    break


@pytest.mark.slow
async def test_a_scrape_waits_for_a_tick_for_as_long_as_is_set(site: Site, gate: Gate) -> None:
    async with site.engine() as engine, contextlib.AsyncExitStack() as stack:
        clients: list[httpx2.AsyncClient] = []
        for seconds in (PATIENT_S, HASTY_S):
            app = create_app(engine, scrape_timeout_s=seconds)
            clients.append(await stack.enter_async_context(httpx2.AsyncClient(transport=httpx2.ASGITransport(app))))
        patient, hasty = clients
        answered: list[int] = []

        async def scrape() -> None:
            answered.append((await patient.get("http://server/metrics")).status_code)

        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.generate("a", seed=1, num_inference_steps=2, gate=str(gate.path), at=1))
            await gate.reached()
            group.start_soon(scrape)
            await anyio.wait_all_tasks_blocked()
            assert (await hasty.get("http://server/metrics")).status_code == 200
            assert not answered
            gate.close()
        assert answered == [200]
