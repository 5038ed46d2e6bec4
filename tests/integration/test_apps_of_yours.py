"""The examples with a pretended engine in each framework's own test client. docs/embedding.md shows these tests."""

from __future__ import annotations

import sys

import pytest
from embedding import EXAMPLES, SERVERS

from steploom.testing import FakeEngine

WISH = {"prompt": "a red circle", "seed": 1}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be imported, each time afresh."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in SERVERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastapi_app
    from fastapi.testclient import TestClient

    monkeypatch.setattr(fastapi_app, "engine", FakeEngine())
    with TestClient(fastapi_app.app) as client:  # `with` runs the lifespan
        assert client.post("/draw", json=WISH).headers["content-type"] == "image/png"
        assert "event: finished" in client.get("/stream", params=WISH).text


def test_starlette_with_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    import starlette_app
    from starlette.testclient import TestClient

    engine = FakeEngine(max_batch=1, max_resident=1, max_waiting=1)
    monkeypatch.setattr(starlette_app, "engine", engine)
    with TestClient(starlette_app.app) as client:
        assert client.portal is not None
        engine.hold()  # no step happens until release()
        client.portal.start_task_soon(engine.generate, "runs")
        client.portal.call(engine.held)
        client.portal.start_task_soon(engine.generate, "waits")
        answer = client.post("/draw", json=WISH)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        engine.release()


def test_litestar(monkeypatch: pytest.MonkeyPatch) -> None:
    import litestar_app
    from litestar.testing import TestClient

    monkeypatch.setattr(litestar_app, "engine", FakeEngine())
    with TestClient(litestar_app.app) as client:
        assert client.post("/draw", json=WISH).headers["content-type"] == "image/png"
        assert client.post("/draw", json={**WISH, "num_inference_steps": 0}).status_code == 400


async def test_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    import aiohttp_app
    from aiohttp.test_utils import TestClient, TestServer

    monkeypatch.setattr(aiohttp_app, "engine", FakeEngine())
    async with TestClient(TestServer(aiohttp_app.app)) as client:
        answer = await client.post("/draw", json=WISH)
        assert answer.content_type == "image/png"


async def test_quart_when_the_worker_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    import quart_app

    engine = FakeEngine()
    monkeypatch.setattr(quart_app, "engine", engine)
    async with quart_app.app.test_app() as app:  # runs what serves around it
        assert (await app.test_client().post("/draw", json=WISH)).mimetype == "image/png"
        engine.die()
        assert (await app.test_client().post("/draw", json=WISH)).status_code == 503
