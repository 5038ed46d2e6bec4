"""The connection to a worker on another machine: only who has its key gets in, and its end is seen at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import zmq

from steploom.config import EngineConfig
from steploom.errors import EngineDead, ProtocolError
from steploom.executor.remote import RemoteSocket
from steploom.worker.messages import Answer, Call, Close, Configure, Fatal, Hello, Progress, Ready, Returned
from steploom.worker.process import LAST_WORDS
from steploom.worker.remote import Door

TESTS = Path(__file__).parents[1]
CODE = """
import sys
from steploom.worker.remote import RemoteWorker
worker = RemoteWorker()
door = worker.listen(sys.argv[1], int(sys.argv[2]))
print(door.url, door.key.decode(), door.pid, flush=True)
sys.exit(worker.serve("scripted_runner:make"))
"""


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", limit: int = 2**30) -> Iterator[tuple[subprocess.Popen[str], Door]]:
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    command = [sys.executable, "-c", CODE, host, str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as worker:
        try:
            assert worker.stdout is not None
            url, key, pid = worker.stdout.readline().split()
            yield worker, Door(url, key.encode(), int(pid))
        finally:
            worker.kill()


class Engine:
    """The engine's end, and what it has heard."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], **config: Any) -> None:
        self.heard: list[Answer] = []
        self.lost = anyio.Event()
        self.heard_before_the_end = -1
        self._news = anyio.Event()
        self.socket = RemoteSocket(context, self._hear, self._damaged, config=EngineConfig(**config))

    def _hear(self, answer: Answer) -> None:
        self.heard.append(answer)
        self._news.set()

    def _damaged(self, error: ProtocolError) -> None:
        raise error

    def _end(self) -> None:
        self.heard_before_the_end = len(self.heard)
        self.lost.set()

    async def connect(self, door: Door) -> None:
        await self.socket.connect(door, self._end)

    async def until(self, kind: type[Answer]) -> Answer:
        while not any(isinstance(answer, kind) for answer in self.heard):
            self._news = anyio.Event()
            await self._news.wait()
        return self.heard[-1]


@contextlib.asynccontextmanager
async def engines(count: int = 1, **config: Any) -> AsyncIterator[list[Engine]]:
    with zmq.Context() as context:
        made = [Engine(context, **config) for _ in range(count)]
        try:
            yield made
        finally:
            for engine in made:
                engine.socket.close()


def binds(host: str) -> bool:
    """Whether the machine has the address; that Python knows its family says nothing."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            one.bind((host, 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_engine_and_its_worker_speak_until_it_says_so(host: str) -> None:
    if ":" in host and not binds(host):
        pytest.skip(f"this machine has no {host}, as some containers")
    with listening(host) as (worker, door):
        async with engines() as (engine,):
            await engine.connect(door)
            assert await engine.until(Hello) == Hello()
            engine.socket.send(Configure.of(EngineConfig()))
            await engine.until(Ready)
            engine.socket.send(Call(1, "pid", [], {}))
            assert await engine.until(Returned) == Returned(1, worker.pid)
            assert door.pid == worker.pid
            engine.socket.send(Close())
            await engine.lost.wait()
        assert worker.wait(60) == 0


async def test_who_does_not_have_the_key_neither_gets_in_nor_takes_the_place() -> None:
    with listening() as (_, door):
        host, _, port = door.url.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as noise, zmq.Context() as context:
            noise.sendall(b"\xff" * 9 + b"\x7f" + b"nonsense" * 50)
            with context.socket(zmq.PAIR) as plain:  # who speaks ZMQ, but has no key at all
                plain.linger = 0
                plain.connect(door.url)
                async with engines(1, ray_reach_timeout_s=0.3) as (stranger,), engines() as (engine,):
                    other, _ = zmq.curve_keypair()
                    with pytest.raises(EngineDead, match="cannot be reached from here"):
                        await stranger.connect(Door(door.url, other, 0))
                    assert stranger.heard == []
                    await engine.connect(door)
                    assert await engine.until(Hello) == Hello()
                assert not plain.poll(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shuts a socket that somebody else listens at")
async def test_who_comes_after_the_engine_is_nobody_to_the_worker() -> None:
    """Strangers without a key must not use up its descriptors for as long as it serves."""
    with listening() as (worker, door):
        host, _, port = door.url.removeprefix("tcp://").rpartition(":")
        async with engines() as (engine,):
            await engine.connect(door)
            engine.socket.send(Configure.of(EngineConfig()))
            await engine.until(Ready)
            before = psutil.Process(worker.pid).num_fds()
            with contextlib.ExitStack() as strangers:
                for _ in range(50):
                    stranger = strangers.enter_context(socket.socket())
                    stranger.setblocking(False)
                    stranger.connect_ex((host, int(port)))
                with pytest.raises(TimeoutError):
                    socket.create_connection((host, int(port)), 0.5)
                engine.socket.send(Call(1, "pid", [], {}))
                assert await engine.until(Returned) == Returned(1, worker.pid)
                assert psutil.Process(worker.pid).num_fds() <= before
            engine.socket.send(Close())
            await engine.lost.wait()
        assert worker.wait(60) == 0


async def test_nobody_listens() -> None:
    with listening() as (worker, door):
        worker.kill()
        worker.wait()
        async with engines(1, ray_reach_timeout_s=0.3) as (engine,):
            with pytest.raises(EngineDead, match="connect to every port"):
                await engine.connect(door)


async def test_a_worker_that_is_killed_is_lost_at_once() -> None:
    with listening() as (worker, door):
        async with engines() as (engine,):
            await engine.connect(door)
            await engine.until(Hello)
            worker.kill()
            with anyio.fail_after(30):
                await engine.lost.wait()


async def test_a_machine_that_falls_silent_is_lost_after_a_while() -> None:
    with listening() as (worker, door):
        async with engines(1, ray_silence_timeout_s=0.4) as (engine,):
            assert (engine.socket._socket.heartbeat_ivl, engine.socket._socket.heartbeat_timeout) == (80, 400)
            await engine.connect(door)
            await engine.until(Hello)
            worker.send_signal(signal.SIGSTOP)
            with anyio.fail_after(30):
                await engine.lost.wait()


async def test_last_words_come_before_the_end() -> None:
    with listening() as (worker, door):
        async with engines() as (engine,):
            await engine.connect(door)
            await engine.until(Hello)
            engine.socket.send(Configure.of(EngineConfig(model="broken")))
            while not engine.lost.is_set():  # a loop that was busy meanwhile, and comes to see the end first
                engine.socket._observe()
            assert [type(answer) for answer in engine.heard] == [Hello, Progress, Fatal]
            assert engine.heard_before_the_end == 3
        assert worker.wait(60) == LAST_WORDS
