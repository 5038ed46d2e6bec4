"""What an application's author gets: work that ends with its client, and an engine for tests."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import httpx2
import pytest
from fakes import assert_empty
from serving import listening
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steploom import DeadlineExceeded, GenerationFailed, InvalidRequest, RequestCancelled, StepEvent, SteploomError
from steploom.testing import FakeEngine
from steploom.web import ClientDisconnected, cancel_on_disconnect


def application(engine: FakeEngine, seen: list[Any]) -> Starlette:
    """A route that draws, and remembers how that ended."""

    async def draw(request: Request) -> Response:
        body = await request.json()
        try:
            out = await cancel_on_disconnect(request, engine.generate(**body))
        except SteploomError as error:
            seen.append(error)
            return JSONResponse({"error": type(error).__name__}, getattr(error, "status", 500))
        return JSONResponse({"size": out.images[0].size})

    return Starlette(routes=[Route("/draw", draw, methods=["POST"])])


async def test_work_ends_with_its_client_and_errors_come_as_they_are() -> None:
    seen: list[Any] = []
    async with FakeEngine() as engine, listening(application(engine, seen)) as address:
        async with httpx2.AsyncClient(base_url=address) as client:
            assert (await client.post("/draw", json={"prompt": "a"})).json() == {"size": [64, 64]}
            assert (await client.post("/draw", json={"prompt": "fail"})).json() == {"error": "GenerationFailed"}
            assert (await client.post("/draw", json={"prompt": "a", "steps": 2})).status_code == 400
            assert [type(error) for error in seen] == [GenerationFailed, InvalidRequest]
        engine.hold()
        async with httpx2.AsyncClient(base_url=address) as client, anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/draw", json={"prompt": "a"}))
            await engine.held()
            group.cancel_scope.cancel()
        engine.release()
    assert isinstance(seen[-1], ClientDisconnected)
    assert isinstance(seen[-1], RequestCancelled)


async def test_work_that_is_cancelled_from_outside_is() -> None:
    async def receive() -> Any:
        await anyio.sleep_forever()

    async with FakeEngine() as engine:
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: cancel_on_disconnect(receive, engine.generate("a")))
            await engine.held()
            group.cancel_scope.cancel()
        engine.release()
        await engine._core.idled()
        assert_empty(engine)
    with pytest.raises(TypeError, match="receive"):
        await cancel_on_disconnect(3, asyncio.Future())


async def test_the_fake_engine_behaves_like_the_real_one() -> None:
    async with FakeEngine(max_batch=4) as engine:
        one, same, other = [await engine.generate("a", seed=seed, width=32) for seed in (1, 1, 2)]
        assert one.images[0].size == (32, 64)
        assert one.images[0].tobytes() == same.images[0].tobytes() != other.images[0].tobytes()
        with pytest.raises(InvalidRequest, match="guidance_scale"):
            await engine.generate("a", guidence_scale=3.0)
        with pytest.raises(InvalidRequest, match="multiples of 8"):
            await engine.generate("a", width=33)
        async with engine.stream("a", preview_every=2, num_inference_steps=6) as run:
            steps = [event async for event in run if isinstance(event, StepEvent)]
        assert steps[-1].step == steps[-1].total_steps == 6
        assert any(step.preview is not None for step in steps)
        assert len((await engine.generate(["a", "b"], num_images_per_prompt=2)).images) == 4
        engine.hold()
        with pytest.raises(DeadlineExceeded):
            await engine.generate("a", timeout=0.01)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(engine.generate, "a")
            await engine.held()
            engine.release(2)
            await engine.held()
            engine.release()
        await engine._core.idled()
        assert_empty(engine)
        assert (await engine.collective_rpc("stats", unique_reply_rank=0)).ticks > 0
