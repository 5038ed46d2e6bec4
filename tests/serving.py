"""Real servers for tests: uvicorn on a free port of this machine, in the test's own event loop."""

from __future__ import annotations

import base64
import contextlib
import io
import pathlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import openai
import uvicorn
from PIL import Image

from steploom.server import create_app
from steploom.testing import FakeEngine


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """An ASGI application, served; yields its address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()  # from now on a client may connect, and waits until the server accepts
        server = uvicorn.Server(
            uvicorn.Config(app, http="h11", lifespan="off", log_config=None, timeout_graceful_shutdown=5)
        )  # h11 as in `steploom serve`: httptools, where it is installed, answers unknown methods itself
        async with anyio.create_task_group() as group:
            group.start_soon(server._serve, [sock])  # serve() would take the signals too
            try:
                yield f"http://127.0.0.1:{sock.getsockname()[1]}"
            finally:
                server.should_exit = True


@contextlib.asynccontextmanager
async def openai_client(**settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, Any]]:
    """OpenAI's client of a server over a pretended engine, and that engine; ``engine`` are fields of its settings."""
    async with (
        FakeEngine(**settings.pop("engine", {})) as engine,
        listening(create_app(engine, **settings)) as address,
        sdk(address) as client,
    ):
        yield client, engine


@contextlib.asynccontextmanager
async def video_client(folder: pathlib.Path, **settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, Any]]:
    """The same over an engine that makes videos, which are stored in ``folder``."""
    async with FakeEngine(makes="videos", **settings.pop("engine", {})) as engine:
        app = create_app(engine, video_dir=folder, **settings)
        async with app.state.server, listening(app) as address, sdk(address) as client:
            yield client, engine


def sdk(address: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def image_of(text: str | None) -> Image.Image:
    """An image in base64."""
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def file_of(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
