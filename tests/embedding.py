"""The example applications behind their real servers, in the test's own event loop, over an engine of the test's."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import httpx2
import hypercorn.asyncio
import uvicorn
from aiohttp import web

from steploom import DiffusionOutput, EngineObserver, SteploomError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SERVERS = {
    "fastapi_app": "uvicorn",
    "starlette_app": "uvicorn",
    "litestar_app": "uvicorn",
    "aiohttp_app": "aiohttp",
    "quart_app": "hypercorn",
}


class Ends(EngineObserver):
    """How requests ended, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[DiffusionOutput | None, SteploomError | None]] = []
        self._changed = anyio.Event()

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        self.seen.append((output, error))
        self._changed.set()
        self._changed = anyio.Event()

    async def become(self, number: int) -> None:
        """Returns when so many requests have ended."""
        while len(self.seen) < number:
            await self._changed.wait()


def example(name: str) -> ModuleType:
    """The example, imported afresh."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # Litestar looks there for annotations
    spec.loader.exec_module(module)
    return module


@contextlib.asynccontextmanager
async def application(name: str, server: str, engine: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the example over ``engine``, which the application's own lifespan starts and closes."""
    module = example(name)
    module.engine = engine
    async with served(module.app, server) as address:
        yield httpx2.AsyncClient(base_url=address, timeout=120)


@contextlib.asynccontextmanager
async def served(app: Any, server: str = "uvicorn", **settings: Any) -> AsyncIterator[str]:
    """An application with its lifespan; yields its address. ``settings`` are uvicorn's."""
    with socket.create_server(("127.0.0.1", 0)) as sock:  # a client may connect already, and waits
        async with {"uvicorn": _uvicorn, "hypercorn": _hypercorn, "aiohttp": _aiohttp}[server](app, sock, **settings):
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.asynccontextmanager
async def _uvicorn(app: Any, sock: socket.socket, **settings: Any) -> AsyncIterator[None]:
    config = uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=5, **settings)
    server = uvicorn.Server(config)
    async with anyio.create_task_group() as group:
        group.start_soon(server._serve, [sock])  # serve() would take the signals too
        try:
            yield
        finally:
            server.should_exit = True


@contextlib.asynccontextmanager
async def _hypercorn(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    config, stop = hypercorn.Config(), anyio.Event()
    config.bind, config.errorlog = [f"fd://{sock.dup().detach()}"], None
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
        try:
            yield
        finally:
            stop.set()


@contextlib.asynccontextmanager
async def _aiohttp(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    runner = web.AppRunner(app, handler_cancellation=True)  # as run_app in the example
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


async def events(response: httpx2.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The messages of a stream of server-sent events: their names and their data."""
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
