"""``/admin``: an operator pauses, drains and reloads a server's engine; nobody else may, and everybody is told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest

from steploom.cli.serving import shutdown
from steploom.server import ServerSettings, create_app
from steploom.testing import FakeEngine

KEY = {"Authorization": "Bearer secret"}
ASK = {"prompt": "a cat", "size": "64x64", "response_format": "b64_json"}


@contextlib.asynccontextmanager
async def server(**settings: Any) -> AsyncIterator[tuple[FakeEngine, httpx.AsyncClient]]:
    async with FakeEngine() as engine:
        app = create_app(engine, ServerSettings(**settings))
        transport = httpx.ASGITransport(app)
        async with app.state.server, httpx.AsyncClient(transport=transport, base_url="http://steploom") as client:
            yield engine, client


async def test_without_an_admin_key_there_is_no_such_thing() -> None:
    async with server(api_keys=("user",)) as (_, client):
        assert (await client.get("/admin/engine", headers={"Authorization": "Bearer user"})).status_code == 404
        assert "/admin/pause" not in (await client.get("/openapi.json")).json()["paths"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer user"}])
async def test_a_clients_key_is_not_an_operators(headers: dict[str, str]) -> None:
    async with server(api_keys=("user",), admin_keys=("secret",)) as (engine, client):
        for what in ("pause", "drain", "reload"):
            assert (await client.post(f"/admin/{what}", headers=headers)).status_code == 401
        assert (await client.get("/admin/engine", headers=headers)).status_code == 401
        assert not engine.paused
        assert (await client.get("/v1/models", headers=KEY)).status_code == 401
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert paths["/admin/pause"]["post"]["security"] == [{"key": []}]


async def test_paused_it_is_not_ready_but_well_and_takes_requests() -> None:
    async with server(admin_keys=("secret",)) as (engine, client), anyio.create_task_group() as group:
        shown = (await client.post("/admin/pause", headers=KEY)).json()
        assert (shown["paused"], shown["draining"], shown["running"]) == (True, False, 0)
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["why"]) == (503, "paused")
        assert (await client.get("/health")).json()["status"] == "healthy"
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await client.post("/v1/images/generations", json=ASK))

        group.start_soon(ask)
        while not engine.num_waiting:
            await anyio.lowlevel.checkpoint()
        assert (await client.get("/admin/engine", headers=KEY)).json()["waiting"] == 1
        await client.post("/admin/resume", headers=KEY)
        assert (await client.get("/ready")).status_code == 200
    assert answers[0].status_code == 200


async def test_drained_it_refuses_with_the_reason_and_ends_what_takes_too_long() -> None:
    async with server(admin_keys=("secret",)) as (engine, client), anyio.create_task_group() as group:
        engine.hold()
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await client.post("/v1/images/generations", json=ASK))

        group.start_soon(ask)
        await engine.held()
        drained = await client.post("/admin/drain", headers=KEY, json={"timeout_s": 0})
        assert (drained.status_code, drained.json()["ended"], drained.json()["draining"]) == (200, 1, True)
        refused = await client.post("/v1/images/generations", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "Retry-After" in refused.headers
        assert (await client.get("/ready")).json()["why"] == "draining"
        engine.release()
        await client.post("/admin/resume", headers=KEY)
        assert (await client.post("/v1/images/generations", json=ASK)).status_code == 200
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining"), answers[0].text


async def test_a_server_that_ends_while_it_is_paused_lets_go_on_what_is_to_end() -> None:
    async with server() as (engine, client), anyio.create_task_group() as group:
        await engine.pause()
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await client.post("/v1/images/generations", json=ASK))

        group.start_soon(ask)
        while not engine.num_waiting:
            await anyio.lowlevel.checkpoint()
        ending = SimpleNamespace(draining=anyio.Event(), should_exit=False)
        ending.draining.set()
        await shutdown.drain(engine, client._transport.app.state.server, ending, 1000.0)
        assert ending.should_exit
    assert answers[0].status_code == 200


async def test_asleep_it_says_so() -> None:
    async with server(admin_keys=("secret",)) as (_, client):
        assert (await client.post("/admin/sleep", headers=KEY, json={"level": 2})).json()["asleep"]
        assert (await client.get("/ready")).json()["why"] == "asleep"
        assert not (await client.post("/admin/wake_up", headers=KEY)).json()["asleep"]


async def test_the_model_is_called_what_it_is_now() -> None:
    async with server(admin_keys=("secret",)) as (_, client):
        answer = await client.post("/admin/reload", headers=KEY, json={"model": "another/one"})
        assert answer.json()["model"] == "another/one"
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "another/one"


@pytest.mark.parametrize(
    ("what", "body", "status", "words"),
    [
        ("drain", {"timeout_s": -1}, 400, "timeout_s=-1"),
        ("drain", {"timeout": 1}, 400, "timeout: there are timeout_s"),
        ("drain", [1], 400, "JSON object"),
        ("reload", {"worker_extension": "os.path"}, 400, "worker_extension: there are model"),
        ("reload", {"dtype": "float7"}, 400, "dtype"),
        ("sleep", {"level": 1}, 409, "paused"),
        ("reload", {}, 409, "paused"),
    ],
)
async def test_what_cannot_be_is_refused(what: str, body: Any, status: int, words: str) -> None:
    async with server(admin_keys=("secret",)) as (engine, client):
        await engine.pause()
        answer = await client.post(f"/admin/{what}", headers=KEY, json=body)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
