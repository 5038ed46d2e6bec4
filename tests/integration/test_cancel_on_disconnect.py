"""cancel_on_disconnect with each framework's own request and websocket, behind real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import anyio
import fastapi
import httpx2
import litestar
import pytest
import quart
from aiohttp import web
from embedding import Ends, served
from fakes import assert_empty
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from steploom import ConfigError, InvalidRequest, QueueFull, RequestCancelled
from steploom.errors import EngineDead
from steploom.testing import FakeEngine
from steploom.web import cancel_on_disconnect, http_error

Read = Callable[[Any], Awaitable[Any]]
READS: dict[str, Read] = {
    "unread": lambda request: anyio.lowlevel.checkpoint(),
    "read": lambda request: request.body(),
}


class Passes(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        return await call_next(request)


class Reads(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        await request.body()
        return await call_next(request)


def in_starlette(engine: FakeEngine, read: Read, *between: Any) -> Any:
    async def draw(request: Request) -> Response:
        await read(request)
        await cancel_on_disconnect(request, engine.generate("a"))
        return Response("drawn")

    routes = [Route("/draw", draw, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(one) for one in between], lifespan=around(engine))


def in_fastapi(engine: FakeEngine, read: Read, *between: Any) -> Any:
    app = fastapi.FastAPI(lifespan=around(engine))
    for one in between:
        app.add_middleware(one)

    @app.post("/draw")
    async def draw(request: fastapi.Request) -> str:
        await read(request)
        await cancel_on_disconnect(request, engine.generate("a"))
        return "drawn"

    draw.__annotations__["request"] = fastapi.Request
    return app


def in_litestar(engine: FakeEngine, read: Read) -> Any:
    async def draw(request: litestar.Request[Any, Any, Any]) -> str:
        await read(request)
        await cancel_on_disconnect(request, engine.generate("a"))
        return "drawn"

    return litestar.Litestar([litestar.post("/draw")(draw)], lifespan=[around(engine)])


def in_quart(engine: FakeEngine, read: Read) -> Any:
    app = quart.Quart("app")

    @app.post("/draw")
    async def draw() -> str:
        await cancel_on_disconnect(quart.request, engine.generate("a"))
        return "drawn"

    app.while_serving(lambda: whiles(engine))
    return app


def in_aiohttp(engine: FakeEngine, read: Read) -> Any:
    async def draw(request: web.Request) -> web.Response:
        await cancel_on_disconnect(request, engine.generate("a"))
        return web.Response(text="drawn")

    app = web.Application()
    app.add_routes([web.post("/draw", draw)])
    app.cleanup_ctx.append(lambda app: whiles(engine))
    return app


def around(engine: FakeEngine) -> Any:
    return lambda app: contextlib.asynccontextmanager(whiles)(engine)


async def whiles(engine: FakeEngine) -> Any:
    async with engine:
        yield


SLOW = pytest.mark.slow  # the same code as one of the others, in another company
WAYS = [
    pytest.param(in_starlette, "uvicorn", "read", ()),
    pytest.param(in_starlette, "uvicorn", "unread", (Passes,)),
    pytest.param(in_fastapi, "uvicorn", "read", (Passes,)),
    pytest.param(in_litestar, "uvicorn", "read", ()),
    pytest.param(in_quart, "hypercorn", "read", ()),
    pytest.param(in_aiohttp, "aiohttp", "read", ()),
    pytest.param(in_starlette, "uvicorn", "unread", (), marks=SLOW),
    pytest.param(in_starlette, "uvicorn", "read", (Passes, Reads, Passes), marks=SLOW),
    pytest.param(in_starlette, "hypercorn", "read", (Passes,), marks=SLOW),
    pytest.param(in_fastapi, "uvicorn", "unread", (Passes,), marks=SLOW),
    pytest.param(in_fastapi, "uvicorn", "read", (Reads,), marks=SLOW),
    pytest.param(in_fastapi, "uvicorn", "unread", (Reads,), marks=SLOW),
    pytest.param(in_litestar, "uvicorn", "unread", (), marks=SLOW),
    pytest.param(in_litestar, "hypercorn", "unread", (), marks=SLOW),
    pytest.param(in_quart, "uvicorn", "read", (), marks=SLOW),
]


@pytest.mark.parametrize(("make", "server", "read", "between"), WAYS)
async def test_the_request_of_every_framework(make: Any, server: str, read: str, between: Any) -> None:
    engine, ends = FakeEngine(), Ends()
    engine.observers.append(ends)
    app = make(engine, READS[read], *between)
    async with served(app, server) as address, httpx2.AsyncClient(base_url=address) as client:
        assert "drawn" in (await client.post("/draw", content=b"x" * 200_000)).text
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/draw", content=b"x" * 200_000))
            await engine.held()
            group.cancel_scope.cancel()
        with anyio.fail_after(30):
            await ends.become(2)
        assert isinstance(ends.seen[1][1], RequestCancelled)
        engine.release()
        assert "drawn" in (await client.post("/draw")).text
        assert_empty(engine)


def sockets_of_starlette(engine: FakeEngine) -> Any:
    async def draw(websocket: WebSocket) -> None:
        await websocket.accept()
        await cancel_on_disconnect(websocket, engine.generate(await websocket.receive_text()))
        await websocket.send_text("drawn")

    return Starlette(routes=[WebSocketRoute("/draw", draw)], lifespan=around(engine))


def sockets_of_litestar(engine: FakeEngine) -> Any:
    async def draw(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        await cancel_on_disconnect(socket, engine.generate(await socket.receive_text()))
        await socket.send_text("drawn")

    return litestar.Litestar([litestar.websocket("/draw")(draw)], lifespan=[around(engine)])


def sockets_of_quart(engine: FakeEngine) -> Any:
    app = quart.Quart("app")

    @app.websocket("/draw")
    async def draw() -> None:
        await cancel_on_disconnect(quart.websocket, engine.generate(await quart.websocket.receive()))
        await quart.websocket.send("drawn")

    app.while_serving(lambda: whiles(engine))
    return app


@pytest.mark.parametrize("make", [sockets_of_starlette, sockets_of_litestar, sockets_of_quart])
async def test_a_websocket(make: Any) -> None:
    engine, ends = FakeEngine(), Ends()
    engine.observers.append(ends)
    async with (
        served(make(engine), "hypercorn") as address,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{address}/draw") as websocket,
    ):
        await websocket.send_str("a")
        assert await websocket.receive_str() == "drawn"
        engine.hold()
        async with session.ws_connect(f"{address}/draw") as other:
            await other.send_str("a")
            await engine.held()
            await other.send_str("are you there?")  # dropped
        with anyio.fail_after(30):
            await ends.become(2)
        assert isinstance(ends.seen[1][1], RequestCancelled)
        engine.release()


async def test_an_aiohttp_server_that_cancels_nothing_is_told_so() -> None:
    seen: list[Exception] = []

    async def draw(request: web.Request) -> web.Response:
        try:
            await cancel_on_disconnect(request, engine.generate("a"))
        except ConfigError as error:
            seen.append(error)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/draw", draw)])
    runner = web.AppRunner(app)
    async with FakeEngine() as engine, httpx2.AsyncClient() as client:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        await client.post(f"http://{host}:{port}/draw")
        await runner.cleanup()
    assert "handler_cancellation=True" in str(seen[0])


async def test_a_fault_of_the_connection_ends_the_work_and_comes_as_it_is() -> None:
    async def receive() -> Any:
        raise RuntimeError("not connected")

    async with FakeEngine() as engine:
        engine.hold()
        with pytest.raises(RuntimeError, match="not connected"):
            await cancel_on_disconnect(receive, engine.generate("a"))
        engine.release()
        await engine.generate("a")
        assert_empty(engine)


def test_errors_as_http_has_them() -> None:
    content, status, headers = http_error(InvalidRequest("width=3: is odd", field="width"))
    assert (content, status, headers) == (
        {"error": {"type": "InvalidRequest", "message": "width=3: is odd", "field": "width"}},
        400,
        {},
    )
    assert http_error(QueueFull("full", retry_after_s=2.4))[1:] == (429, {"Retry-After": "3"})
    assert http_error(QueueFull("full"))[1:] == (429, {"Retry-After": "1"})
    assert http_error(EngineDead("dead"))[1:] == (503, {"Retry-After": "1"})
    assert http_error(RequestCancelled("drained", drained=True))[1:] == (503, {"Retry-After": "1"})
    assert http_error(RequestCancelled("aborted"))[1:] == (499, {})
    assert http_error(ValueError("no JSON"))[:2] == (
        {"error": {"type": "ValueError", "message": "no JSON", "field": None}},
        400,
    )
    assert http_error(KeyError("secret")) == (
        {"error": {"type": "InternalError", "message": "internal error", "field": None}},
        500,
        {},
    )
