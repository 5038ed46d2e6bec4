"""The five example applications behind real servers, over a pretended engine: routes, errors, clients that hang up."""

from __future__ import annotations

import base64
import io
from typing import Any

import anyio
import pytest
from embedding import SERVERS, Ends, application, events
from fakes import assert_empty
from PIL import Image

from steploom import RequestCancelled
from steploom.testing import FakeEngine

APPLICATIONS = [
    *SERVERS.items(),
    # One server is as good as another.
    pytest.param("fastapi_app", "hypercorn", marks=pytest.mark.slow),
    pytest.param("litestar_app", "hypercorn", marks=pytest.mark.slow),
    pytest.param("quart_app", "uvicorn", marks=pytest.mark.slow),
]
pytestmark = pytest.mark.parametrize(("name", "server"), APPLICATIONS)
WISH = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 4}


def watched(**config: Any) -> tuple[FakeEngine, Ends]:
    engine, ends = FakeEngine(**config), Ends()
    engine.observers.append(ends)
    return engine, ends


async def test_an_image_and_a_stream_that_develops(name: str, server: str) -> None:
    engine, ends = watched()
    async with application(name, server, engine) as client, client:
        answer = await client.post("/draw", json=WISH)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        engine.hold()
        async with client.stream("GET", "/stream", params=WISH) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
            assert response.headers.get_list("content-type") == [response.headers["content-type"]]
            assert response.headers["cache-control"] == "no-cache"
            messages = events(response)
            assert await anext(messages) == ("queued", {"position": 0})
            for step in (1, 2, 3, 4):
                assert len(ends.seen) == 1, "it has not ended"
                engine.release(1)
                kind, told = await anext(messages)
                assert (kind, told["step"], told["total_steps"]) == ("step", step, 4)
                assert told["preview"].startswith("data:image/png;base64,")
            kind, told = await anext(messages)
            assert (kind, told["seed"], told["steps"]) == ("finished", 7, 4)
            assert [message async for message in messages] == []
        shown = Image.open(io.BytesIO(base64.b64decode(told["images"][0].partition(",")[2])))
        assert shown.tobytes() == Image.open(io.BytesIO(answer.content)).tobytes()
    assert_empty(engine)


@pytest.mark.slow
async def test_errors_have_their_status_on_both_routes(name: str, server: str) -> None:
    engine, _ = watched(max_waiting=1, max_batch=1, max_resident=1)
    async with application(name, server, engine) as client, client:
        for wish in ({**WISH, "num_inference_steps": 0}, {**WISH, "num_inference_steps": 100_000}):
            for answer in (await client.post("/draw", json=wish), await client.get("/stream", params=wish)):
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["field"] == "num_inference_steps"
        for answer in (
            await client.post("/draw", json={"seed": 1}),
            await client.post("/draw", content=b"{", headers={"content-type": "application/json"}),
            await client.get("/stream", params={**WISH, "num_inference_steps": "many"}),
            await client.get("/stream"),
        ):
            assert answer.status_code in (400, 422), answer.text  # FastAPI's own for what it parses
        assert (await client.post("/draw", json={**WISH, "prompt": "fail"})).status_code == 500
        assert 'event: failed\ndata: {"error"' in (await client.get("/stream", params={"prompt": "fail"})).text
        engine.hold()
        async with anyio.create_task_group() as group:
            async with client.stream("GET", "/stream", params=WISH):
                await engine.held()  # the first one is resident
                async with client.stream("GET", "/stream", params=WISH):  # the second one waits
                    for full in (await client.post("/draw", json=WISH), await client.get("/stream", params=WISH)):
                        assert full.status_code == 429
                        assert int(full.headers["retry-after"]) >= 1
                        assert full.json()["error"]["type"] == "QueueFull"
            group.cancel_scope.cancel()
        engine.release()


@pytest.mark.parametrize("route", ["draw", "stream"])
async def test_a_client_that_hangs_up_ends_its_request(name: str, server: str, route: str) -> None:
    engine, ends = watched()
    async with application(name, server, engine) as client, client:
        engine.hold()
        if route == "draw":
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: client.post("/draw", json=WISH))
                await engine.held()
                group.cancel_scope.cancel()
        else:
            async with client.stream("GET", "/stream", params=WISH) as response:
                messages = events(response)
                await anext(messages)
                engine.release(1)
                assert (await anext(messages))[0] == "step"
                await messages.aclose()
        with anyio.fail_after(30):
            await ends.become(1)
        ((output, error),) = ends.seen
        assert output is None
        assert isinstance(error, RequestCancelled)
        engine.release()
        assert (await client.post("/draw", json=WISH)).status_code == 200
        assert (await engine.collective_rpc("stats", unique_reply_rank=0)).resident == 0
        assert_empty(engine)


@pytest.mark.slow
async def test_who_is_late_for_the_end_leaves_nothing(name: str, server: str) -> None:
    """The application is shut down while somebody draws and somebody watches."""
    engine, ends = watched()
    async with application(name, server, engine) as client, client, anyio.create_task_group() as group:
        group.start_soon(lambda: client.post("/draw", json=WISH))
        async with client.stream("GET", "/stream", params=WISH) as response:
            assert "event: finished" in (await response.aread()).decode()
        await ends.become(2)
    assert_empty(engine)
    left = [task.name for task in anyio.get_running_tasks() if "steploom" in (task.name or "")]
    assert not left
