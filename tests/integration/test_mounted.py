"""create_app inside somebody else's application: the OpenAI SDK at the mount, the host's middleware, proxies."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import fastapi
import httpx2
import litestar
import openai
import pytest
from embedding import Ends, served
from fakes import assert_empty
from litestar.types import Receive, Scope, Send
from serving import image_of
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from steploom import RequestCancelled
from steploom.server import create_app
from steploom.testing import FakeEngine


class Stamps(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        response.headers["x-host"] = "was here"
        return response


def lifespan_of(engine: FakeEngine) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with engine:
            yield

    return lifespan


def in_starlette(engine: FakeEngine, **settings: Any) -> Any:
    routes = [Mount("/images", create_app(engine, **settings))]
    middleware = [Middleware(Stamps), Middleware(GZipMiddleware)]
    return Starlette(routes=routes, lifespan=lifespan_of(engine), middleware=middleware)


def in_fastapi(engine: FakeEngine, root_path: str = "", **settings: Any) -> Any:
    app = fastapi.FastAPI(lifespan=lifespan_of(engine), root_path=root_path)
    app.mount("/images", create_app(engine, **settings))
    app.add_middleware(Stamps)
    app.add_middleware(GZipMiddleware)
    return app


def in_a_fastapi_that_knows_its_proxy(engine: FakeEngine, **settings: Any) -> Any:
    return in_fastapi(engine, root_path="/proxy", **settings)


def in_litestar(engine: FakeEngine, **settings: Any) -> Any:
    inner = create_app(engine, **settings)

    @litestar.asgi("/images", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)  # type: ignore[arg-type]

    return litestar.Litestar([mounted], lifespan=[lifespan_of(engine)], logging_config=None)


HOSTS = [
    (in_starlette, ""),
    pytest.param(in_fastapi, "", marks=pytest.mark.slow),
    pytest.param(in_starlette, "/proxy", marks=pytest.mark.slow),  # uvicorn --root-path
    pytest.param(in_fastapi, "/proxy", marks=pytest.mark.slow),
    pytest.param(
        in_a_fastapi_that_knows_its_proxy, "", marks=pytest.mark.filterwarnings("ignore:The `root_path` parameter")
    ),
]


@pytest.mark.parametrize(("make", "root_path"), HOSTS)
async def test_the_sdk_at_the_mount(make: Any, root_path: str) -> None:
    engine, ends = FakeEngine(), Ends()
    engine.observers.append(ends)
    app = make(engine, api_keys=("secret",))
    async with (
        served(app, root_path=root_path) as address,
        openai.AsyncOpenAI(base_url=f"{address}/images/v1", api_key="secret", max_retries=0) as client,
        httpx2.AsyncClient() as plain,
    ):
        assert [model.id async for model in client.models.list()] == ["demo"]
        drawn = await client.images.with_raw_response.generate(prompt="a", size="32x32", extra_body={"seed": 1})
        assert drawn.headers["x-host"] == "was here"
        data = drawn.parse().data
        assert data is not None
        assert image_of(data[0].b64_json).size == (32, 32)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.generate(prompt="a", size="33x32")
        assert refused.value.param == "size" or refused.value.param == "width"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()

        kept = (await client.images.generate(prompt="a", response_format="url")).data
        assert kept is not None
        url = str(kept[0].url)
        prefix = "/proxy" if root_path or make is in_a_fastapi_that_knows_its_proxy else ""
        assert url.startswith(f"{address}{prefix}/images/v1/images/stored/")
        assert (await plain.get(url.replace(prefix, "", 1) if prefix else url)).status_code == 200  # as the proxy does
        assert (await plain.get(f"{address}/images/ready")).status_code == 200

        engine.hold()
        stream = await client.images.generate(
            prompt="a", stream=True, partial_images=3, extra_body={"num_inference_steps": 8}
        )
        engine.release(4)
        event = await anext(aiter(stream))
        assert event.type == "image_generation.partial_image"
        await stream.close()
        with anyio.fail_after(30):
            await ends.become(3)
        assert isinstance(ends.seen[-1][1], RequestCancelled)
        engine.release()
        await client.images.generate(prompt="a")
        assert_empty(engine)


async def test_a_key_is_asked_for_whatever_the_root_path_is() -> None:
    """Servers that do not put the root path before the path: what routes see is what the gate sees."""
    for root_path in ("", "/", "/v", "/v1", "/proxy"):
        for path in ("/v1/models", "/v/v1/models", "/proxy/v1/models", "//v1/models", "/v1/v1/models"):
            async with FakeEngine() as engine:
                transport = httpx2.ASGITransport(create_app(engine, api_keys=("secret",)), root_path=root_path)
                async with httpx2.AsyncClient(transport=transport, base_url="http://host") as client:
                    assert (await client.get(path)).status_code in (401, 404), (root_path, path)


@pytest.mark.parametrize("prefix", ["", "/proxy"], ids=["strips", "does not strip"])
@pytest.mark.parametrize("root_path", ["/proxy", "/v1", "/a/b"])
async def test_by_itself_behind_a_proxy(root_path: str, prefix: str) -> None:
    """uvicorn --root-path: it puts that before the path whatever the proxy does."""
    prefix = prefix and root_path
    app = create_app(FakeEngine(), api_keys=("secret",))
    async with (
        served(app, root_path=root_path) as address,
        openai.AsyncOpenAI(base_url=f"{address}{prefix}/v1", api_key="secret", max_retries=0) as client,
        httpx2.AsyncClient() as plain,
    ):
        drawn = (await client.images.generate(prompt="a", size="32x32", response_format="url")).data
        assert drawn is not None
        url = str(drawn[0].url)
        assert url.startswith(f"{address}{root_path}/v1/images/stored/")
        inner = url.replace(root_path, prefix, 1)
        assert (await plain.get(inner)).status_code == 200
        assert (await plain.get(f"{address}{prefix}/v1/models")).status_code == 401
        counted = (await plain.get(f"{address}{prefix}/metrics")).text
        assert 'route="/v1/images/stored/{name}",status="200"} 1.0' in counted
        assert "unmatched" not in counted


async def test_in_litestar() -> None:
    """It mounts with a path that ends with a slash, and without a root path."""
    app = in_litestar(FakeEngine(), api_keys=("secret",))
    async with (
        served(app) as address,
        openai.AsyncOpenAI(base_url=f"{address}/images/v1", api_key="secret", max_retries=0) as client,
        httpx2.AsyncClient() as plain,
    ):
        assert [model.id async for model in client.models.list()] == ["demo"]
        kept = (await client.images.generate(prompt="a", response_format="url")).data
        assert kept is not None
        assert str(kept[0].url).startswith(f"{address}/images/v1/images/stored/")
        assert (await plain.get(str(kept[0].url))).status_code == 200
        assert (await plain.get(f"{address}/images/ready")).status_code == 200
        assert (await plain.get(f"{address}/images/v1/models/")).status_code == 401
