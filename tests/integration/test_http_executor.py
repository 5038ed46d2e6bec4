"""examples/http_executor.py, in front of a server of this library over a pretended model."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from aiohttp import web
from fakes import settled
from PIL import Image
from serving import listening

from examples import example
from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    EngineError,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
)
from steploom.requests import OWN_FIELDS
from steploom.server import create_app
from steploom.testing import FakeEngine

MODULE = example("http_executor")
HttpExecutor = MODULE.HttpExecutor


@contextlib.asynccontextmanager
async def remote(**config: Any) -> AsyncIterator[tuple[AsyncDiffusionEngine, FakeEngine]]:
    """An engine whose executor asks a server, and the engine of that server."""
    async with (
        FakeEngine(**config) as there,
        listening(create_app(there)) as address,
        AsyncDiffusionEngine(model=address, distributed_executor_backend=HttpExecutor) as here,
    ):
        yield here, there


async def test_images_are_the_remotes_own() -> None:
    async with remote() as (here, there):
        outs: dict[int, Any] = {}

        async def one(seed: int) -> None:
            outs[seed] = await here.generate("a red circle", seed=seed, width=32, height=64)

        async with anyio.create_task_group() as group:
            for seed in range(4):
                group.start_soon(one, seed)
        for seed, out in outs.items():
            alone = await there.generate("a red circle", seed=seed, width=32, height=64)
            assert out.images[0].tobytes() == alone.images[0].tobytes()
            assert out.seed == seed
        assert len({out.images[0].tobytes() for out in outs.values()}) == 4


async def test_errors_are_the_remotes_own() -> None:
    async with remote() as (here, there):
        with pytest.raises(InvalidRequest, match=r"num_inference_stepz: unknown.*num_inference_steps") as caught:
            await here.generate("a cat", num_inference_stepz=3)
        assert caught.value.field == "num_inference_stepz"
        with pytest.raises(InvalidRequest, match="sigmas: a list does not travel"):
            await here.generate("a cat", sigmas=[1.0])
        with pytest.raises(GenerationFailed, match="ValueError: fail"):
            await here.generate("fail", num_inference_steps=3)
        (out,) = await here._core.executor.add_requests([MODULE.DiffusionRequest("fail")])
        assert isinstance(out.error, GenerationFailed)
        assert out.output is None
        there.die()
        with pytest.raises(EngineError, match="HTTP 503"):  # nor is it a 500 here
            await here.generate("a cat")
        with pytest.raises(EngineError, match="HTTP 503"):
            await here.check_health()


@pytest.mark.parametrize(
    "asked",
    [
        {"output_type": "latent"},
        {"noise_scheduler": "DDIMScheduler"},
        {"return_trajectory": True},
        {"preview_every": 1},
        {"latents_every": 2},
    ],
)
async def test_what_does_not_travel_is_refused(asked: dict[str, Any]) -> None:
    async with remote() as (here, _):
        with pytest.raises(InvalidRequest, match="does not travel") as caught:
            await here.generate("a cat", **asked)
        assert [caught.value.field] == list(asked)


def test_each_field_of_a_request_travels_or_is_refused() -> None:
    here = {"request_id", "draft_every"}  # of the engine in front; text alone has drafts
    assert {*MODULE.OWN, *MODULE.REFUSED, *here} == set(OWN_FIELDS)


async def test_a_machine_that_has_vanished_is_noticed() -> None:
    async with remote() as (here, _):
        await here.generate("a cat")
        connector = here._core.executor._session.connector
        ((protocol, _), *_) = next(iter(connector._conns.values()))
        connection = protocol.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in MODULE.KEPT_ALIVE.items():
            if hasattr(socket, name):
                assert connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


async def test_a_full_queue_there_is_a_full_queue_here() -> None:
    async with remote(max_waiting=1, max_batch=1, max_resident=1) as (here, there), anyio.create_task_group() as group:
        there.hold()
        running = there.stream("running")
        waiting = there.stream("waiting")
        async with running:
            await there.held()
            async with waiting:
                with pytest.raises(QueueFull):
                    await here.generate("one too many")
                there.release()
        group.cancel_scope.cancel()


async def test_whom_a_drain_ends_there_another_one_may_take_here() -> None:
    async with remote() as (here, there), anyio.create_task_group() as group:
        there.hold()

        async def drawn() -> None:
            with pytest.raises(RequestCancelled, match="was drained") as caught:
                await here.generate("a cat")
            assert caught.value.drained
            assert caught.value.status == 503

        group.start_soon(drawn)
        await there.held()
        assert await there.drain(timeout_s=0) == 1
        there.release()
        with pytest.raises(RequestCancelled, match="takes no new requests") as caught:
            await here.generate("a cat")
        assert caught.value.drained
        await there.resume()
        assert (await here.generate("a cat")).images


async def test_who_leaves_here_leaves_there() -> None:
    async with remote() as (here, there):
        there.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(here.generate, "left alone")
            await there.held()
            group.cancel_scope.cancel()
        there.release()
        await settled(there)
        there.hold()
        with pytest.raises(DeadlineExceeded):
            await here.generate("late", timeout=0.2)
        there.release()
        await settled(there)
        there.hold()
        async with anyio.create_task_group() as group:

            async def aborted() -> None:
                with pytest.raises(RequestCancelled):
                    await here.generate("aborted", request_id="mine")

            group.start_soon(aborted)
            await there.held()
            assert await here.abort("mine")
        there.release()
        await settled(there)


async def test_calls_and_health() -> None:
    async with remote() as (here, _):
        await here.check_health()
        assert await here.collective_rpc("ping") == ["pong"]
        assert await here.collective_rpc("ping", unique_reply_rank=0) == "pong"
        with pytest.raises(InvalidRequest, match="forwards 'ping' only"):
            await here.collective_rpc("stats")
        with pytest.raises(TimeoutError):
            await here.collective_rpc("ping", timeout=0)


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@contextlib.asynccontextmanager
async def answering(models: Any, images: list[Any]) -> AsyncIterator[str]:
    """The address of a server that gives the images that it is told to."""

    async def said(request: web.Request) -> web.Response:
        answers = {"/ready": {}, "/v1/models": models, "/v1/images/generations": images[-1] if images else None}
        return web.json_response(answers[request.path])

    app = web.Application()
    app.add_routes([web.route("*", "/{any:.*}", said)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ({"data": []}, 1),
        ({"data": [{"b64_json": png()}] * 3}, 1),
        ({"data": [{"b64_json": png()}]}, 2),
        (None, 1),
        ([1, 2], 1),
        ({"data": None}, 1),
        ({"data": [{}]}, 1),
        ({"data": [{"b64_json": "!!!"}]}, 1),
        ({"data": [{"b64_json": None}]}, 1),
        ({"data": [{"b64_json": base64.b64encode(b"no picture").decode()}]}, 1),
    ],
)
async def test_an_answer_that_is_none_is_told_with_its_address(answer: Any, count: int) -> None:
    told: list[Any] = [answer]
    async with (
        answering({"data": [{"id": "x"}]}, told) as address,
        AsyncDiffusionEngine(model=address, distributed_executor_backend=HttpExecutor) as engine,
    ):
        with pytest.raises(EngineError, match=f"{address} answered nonsense: "):
            await engine.generate("a cat", num_images_per_prompt=count)
        told.append({"data": [{"b64_json": png()}] * count})
        assert len((await engine.generate("a cat", num_images_per_prompt=count)).images) == count


@pytest.mark.parametrize("models", [None, [], {"data": []}, {"data": [{}]}])
async def test_a_start_that_is_answered_with_nonsense(models: Any) -> None:
    async with answering(models, []) as address:
        with pytest.raises(EngineError, match=f"{address} answered nonsense: "):
            async with AsyncDiffusionEngine(model=address, distributed_executor_backend=HttpExecutor):
                pass


async def test_nobody_there_is_told_at_the_start() -> None:
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 does not answer"):
        async with AsyncDiffusionEngine(model="http://127.0.0.1:9", distributed_executor_backend=HttpExecutor):
            pass
