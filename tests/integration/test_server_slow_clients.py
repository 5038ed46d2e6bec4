"""Clients that do not read, and clients that say nothing: neither holds back a tick, nor makes anything grow."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from serving import listening, openai_client, sdk

from steploom import EngineObserver
from steploom.server import create_app
from steploom.server.answers import Answer
from steploom.testing import FakeEngine

STEPS = 200
STREAM = {"prompt": "slow", "n": 2, "stream": True, "partial_images": 3, "num_inference_steps": STEPS}


class StalledClient:
    """A client of an ASGI application that has asked, and takes nothing more of the answer until it is told to."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._asked = False
        self.reads = anyio.Event()
        self.gone = anyio.Event()
        self.stalled = anyio.Event()
        self.got: list[bytes] = []

    async def ask(self, app: Any, path: str = "/v1/images/generations") -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
                 "query_string": b"", "headers": headers, "scheme": "http", "server": ("server", 80)}  # fmt: skip
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.stalled.set()
            await self.reads.wait()
            self.got.append(message.get("body", b""))


@contextlib.asynccontextmanager
async def stalled(client: StalledClient, app: Any) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(client.ask, app)
        await client.stalled.wait()
        yield


async def emptied(app: Any) -> None:
    with anyio.fail_after(30):
        await app.state.server.running.emptied()


async def test_ticks_go_on_while_a_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Answer] = []
    made = Answer.__init__
    monkeypatch.setattr(Answer, "__init__", lambda self, *a, **k: (answers.append(self), made(self, *a, **k))[1])
    async with FakeEngine() as engine:
        app, client = create_app(engine), StalledClient(STREAM)
        async with stalled(client, app):
            await emptied(app)  # all of its steps are done, and nobody has read a word
            assert not client.got
            assert (await engine.generate("another", num_inference_steps=3)).images
            (answer,) = answers
            assert 2 <= len(answer._generation.log) <= 2 * (3 + 1)  # of 400 steps
            client.reads.set()
        events = [json.loads(part.split(b"data: ")[1]) for part in client.got if part]
        for index in (0, 1):
            steps = [event["step"] for event in events if event["image_index"] == index]
            assert steps[-1] == STEPS
            assert steps == sorted(steps)


async def test_a_client_that_does_not_read_and_hangs_up_ends_its_work() -> None:
    async with FakeEngine() as engine:
        engine.hold()
        app, client = create_app(engine), StalledClient({**STREAM, "num_inference_steps": 4, "n": 1})
        async with anyio.create_task_group() as group:
            group.start_soon(client.ask, app)
            await engine.held()
            engine.release(2)  # a preview is on its way
            await client.stalled.wait()
            client.gone.set()
            await emptied(app)
        engine.release()
        await engine._core.idled()
        assert not engine._core.executor._resident


@pytest.fixture
def many_files() -> Any:
    """Both ends of a thousand connections are files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def ticks_of(client: Any, engine: FakeEngine, requests: int) -> int:
    """Ticks that some requests at once take. They are held until all of them wait: what is counted is the engine's.

    The first one is there before the others come: a tick is sent for it, and they join the one that is sent ahead.
    """

    async def are_there(count: int) -> None:
        while len((await client.get("/requests", cast_to=dict))["data"]) < count:
            await anyio.lowlevel.checkpoint()

    engine.hold()
    before = engine._core.executor._stats.ticks
    async with anyio.create_task_group() as group:
        for seed in range(requests):
            group.start_soon(lambda seed=seed: client.images.generate(prompt="a", extra_body={"seed": seed}))
            if seed == 0:
                await are_there(1)
        await are_there(requests)
        engine.release()
    return engine._core.executor._stats.ticks - before


@pytest.mark.slow
async def test_a_thousand_idle_connections_and_slow_readers_cost_no_tick(many_files: None) -> None:
    async with FakeEngine() as engine:
        engine.observers.append(ended := Ended())
        async with listening(create_app(engine)) as address, sdk(address) as client:
            alone = await ticks_of(client, engine, 16)
            where = ("127.0.0.1", int(address.rpartition(":")[2]))
            with contextlib.ExitStack() as stack:
                for index in range(1000):
                    idle = await connected(stack, where)
                    if index % 2:
                        idle.send(b"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-le")
                for _ in range(8):
                    await _ask_and_read_nothing(stack, where)
                await ended.reach(16 + 8 * STREAM["n"])  # nobody has read what these have made
                assert await ticks_of(client, engine, 16) == alone


class Ended(EngineObserver):
    """Counts the requests that have ended."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = anyio.Event()

    def on_end(self, *_: object) -> None:
        self.count += 1
        self.changed.set()
        self.changed = anyio.Event()

    async def reach(self, count: int) -> None:
        with anyio.fail_after(60):
            while self.count < count:
                await self.changed.wait()


async def connected(stack: contextlib.ExitStack, where: tuple[str, int]) -> socket.socket:
    """A connection that takes little at once."""
    made = stack.enter_context(contextlib.closing(socket.socket()))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        made.connect(where)
    await anyio.wait_writable(made)
    return made


async def _ask_and_read_nothing(stack: contextlib.ExitStack, where: tuple[str, int]) -> None:
    slow = await connected(stack, where)
    body = json.dumps({**STREAM, "num_inference_steps": 8, "size": "1024x1024"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
    slow.send(head.encode() + body)


async def test_an_answer_in_one_piece_waits_for_its_client_alone() -> None:
    async with openai_client() as (client, engine):
        stalled_client = StalledClient({"prompt": "a", "n": 4})
        app = create_app(engine)
        async with stalled(stalled_client, app):
            assert (await client.images.generate(prompt="b")).data
            stalled_client.reads.set()
        assert len(json.loads(b"".join(stalled_client.got))["data"]) == 4
