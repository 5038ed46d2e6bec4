"""The example application behind a real uvicorn: routes, errors, and clients that hang up."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import uvicorn
from fakes import assert_empty
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "starlette_app.py"
TRIES = 200


@contextlib.asynccontextmanager
async def serving(engine: Any) -> AsyncIterator[int]:
    """The example's app over a running engine; gives the port."""
    spec = importlib.util.spec_from_file_location("starlette_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.app.state.engine = engine
    server = uvicorn.Server(uvicorn.Config(module.app, lifespan="off", log_level="warning"))
    # Connections wait in this socket's backlog until the server is up: nobody has to ask whether it is.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, [listening])
            yield listening.getsockname()[1]
            server.should_exit = True


async def connect(port: int, path: str) -> anyio.abc.SocketStream:
    stream = await anyio.connect_tcp("127.0.0.1", port)
    await stream.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    return stream


async def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    answer = b""
    async with await connect(port, path) as stream:
        async for part in stream:
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def residents_become(port: int, wanted: int) -> None:
    """Asks until so many requests are resident; each time is a round trip to the worker."""
    for _ in range(TRIES):
        if json.loads((await get(port, "/residents"))[1])["residents"] == wanted:
            return
    pytest.fail(f"never became {wanted}")


async def test_a_finished_image_and_a_refusal(mp_engine: Any) -> None:
    async with serving(mp_engine) as port:
        status, body = await get(port, "/generate?prompt=cat&steps=3")
        assert status == 200
        assert Image.open(io.BytesIO(body)).size == (32, 32)
        status, body = await get(port, "/generate?prompt=cat&steps=0")
        assert status == 400
        assert json.loads(body)["error"].startswith("num_inference_steps=0")
        assert b"EventSource" in (await get(port, "/"))[1]


async def test_a_stream_tells_every_step_to_its_end(mp_engine: Any) -> None:
    async with serving(mp_engine) as port:
        status, body = await get(port, "/stream?prompt=cat&steps=4")
        assert status == 200
        messages = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
        assert messages[-1]["step"] == messages[-1]["total"] == 4
        assert messages[-1]["image"]


@pytest.mark.parametrize("path", ["/stream?prompt=cat&steps=900", "/generate?prompt=cat&steps=900"])
async def test_a_client_that_hangs_up_frees_its_slot(mp_engine: Any, path: str) -> None:
    async with serving(mp_engine) as port:
        async with await connect(port, path):
            await residents_become(port, 1)
        await residents_become(port, 0)
    assert_empty(mp_engine)
