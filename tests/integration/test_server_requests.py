"""Requests of the server over a pretended engine: who hangs up, retries, waits, cancels, and who may come in."""

from __future__ import annotations

import contextlib

import anyio
import httpx2
import openai
import pytest
from serving import listening, openai_client, sdk
from starlette.applications import Starlette
from starlette.routing import Mount

from steploom.server import create_app
from steploom.testing import FakeEngine

STEPS = {"num_inference_steps": 4}


async def test_a_client_that_hangs_up_ends_its_work() -> None:
    async with openai_client() as (client, engine):

        async def whole() -> None:
            await client.images.generate(prompt="a", n=2)

        async def streamed() -> None:
            stream = await client.images.generate(prompt="a", n=2, stream=True, partial_images=1)
            async with stream:
                await anyio.sleep_forever()

        for asked in (whole, streamed):
            engine.hold()
            async with anyio.create_task_group() as group:
                group.start_soon(asked)
                await engine.held()
                group.cancel_scope.cancel()
            await nobody_runs(client)  # listed no more, though no tick has passed
            engine.release()
            await engine._core.idled()
            assert not engine._core.executor._resident


async def nobody_runs(client: openai.AsyncOpenAI) -> None:
    """Returns when the server lists no request: each answer waits for the one before."""
    with anyio.fail_after(30):
        while (await client.get("/requests", cast_to=dict))["data"]:
            await anyio.lowlevel.checkpoint()


async def test_a_client_that_hangs_up_is_ignored_if_told_so() -> None:
    async with openai_client(on_disconnect="keep") as (client, engine):
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.images.generate(prompt="a"))
            await engine.held()
            group.cancel_scope.cancel()
        assert len((await client.get("/requests", cast_to=dict))["data"]) == 1
        engine.release()
        await nobody_runs(client)


async def test_a_retried_request_joins_the_running_one() -> None:
    key = {"Idempotency-Key": "k"}
    async with openai_client() as (client, engine):
        engine.hold()
        answers = []

        async def ask(**asked: object) -> None:
            answers.append(await client.images.generate(prompt="a", extra_headers=key, **asked))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await engine.held()
            group.cancel_scope.cancel()  # the client times out, and tries again
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(ask)
            assert len((await client.get("/requests", cast_to=dict))["data"]) == 1
            with pytest.raises(openai.UnprocessableEntityError, match="another request"):
                await client.images.generate(prompt="b", extra_headers=key)
            engine.release()
        await ask()  # answered from what was made
        assert len({answer.data[0].b64_json for answer in answers}) == 1
        assert len({answer.data[0].seed for answer in answers}) == 1


async def test_what_runs_is_listed_and_can_be_cancelled() -> None:
    async with openai_client() as (client, engine):
        engine.hold()

        async def ask() -> None:
            with pytest.raises(openai.APIStatusError, match="aborted") as caught:
                await client.images.generate(prompt="a", extra_body={"priority": 3, **STEPS})
            assert (caught.value.status_code, caught.value.code) == (499, "request_cancelled")

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await engine.held()
            (entry,) = (await client.get("/requests", cast_to=dict))["data"]
            assert (entry["status"], entry["priority"]) == ("queued", 3)
            engine.release(1)
            await engine.held()
            (entry,) = (await client.get("/requests", cast_to=dict))["data"]
            assert (entry["status"], entry["step"], entry["num_inference_steps"]) == ("running", 1, 4)
            assert (await client.get(f"/requests/{entry['id']}", cast_to=dict))["step"] == 1
            await client.delete(f"/requests/{entry['id']}", cast_to=dict)
            engine.release()
        with pytest.raises(openai.NotFoundError):
            await client.delete(f"/requests/{entry['id']}", cast_to=dict)


async def test_outcomes_have_the_status_that_fits() -> None:
    async with openai_client(engine={"max_waiting": 1, "max_batch": 1, "max_resident": 1}) as (client, engine):
        with pytest.raises(openai.InternalServerError, match="fail now") as failed:
            await client.images.generate(prompt="fail now", n=1)
        assert (failed.value.code, "Traceback" in str(failed.value)) == ("generation_failed", False)
        stream = await client.images.generate(prompt="fail now", stream=True)
        with pytest.raises(openai.APIError, match="fail now"):
            [event async for event in stream]
        engine.hold()
        with pytest.raises(openai.InternalServerError) as late:
            await client.images.generate(prompt="a", extra_body={"timeout": 0.01})
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.RateLimitError, match="the queue has 1 places; ask for fewer") as never:
            await client.images.generate(prompt="a", n=3)
        assert never.value.param == "n"
        assert never.value.response.headers["x-should-retry"] == "false"
        async with anyio.create_task_group() as group:
            group.start_soon(engine.generate, "waits")
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(openai.RateLimitError, match="max_waiting=1") as full:
                await client.images.generate(prompt="a")
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert "x-should-retry" not in full.value.response.headers
            engine.release()


async def test_keys_sizes_and_kinds_of_bodies() -> None:
    async with openai_client(api_keys=("right", "other"), max_body_bytes=1000) as (client, _):
        with pytest.raises(openai.AuthenticationError, match="wrong"):
            await client.images.generate(prompt="a")
        right = client.with_options(api_key="right")
        await right.images.generate(prompt="a")
        with pytest.raises(openai.APIStatusError, match="1000 bytes") as caught:
            await right.images.generate(prompt="a" * 2000)
        assert caught.value.status_code == 413
        head = {"Authorization": "Bearer other"}
        async with httpx2.AsyncClient(base_url=str(client.base_url), headers=head) as plain:

            async def pieces():
                for _ in range(20):
                    yield b"x" * 100

            answers = [
                (await plain.post("images/generations", content=pieces()), 413),
                (await plain.post("images/generations", content="<a/>", headers={"content-type": "text/xml"}), 415),
                (await plain.post("images/generations", content="{"), 400),
                (await plain.post("images/generations", json=[1]), 400),
                (await plain.get("images/generations"), 405),
                (await plain.get("nothing"), 404),
            ]
        for answer, status in answers:
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"]


async def test_it_is_ready_once_it_is_and_not_while_it_drains() -> None:
    app = create_app(engine := FakeEngine())
    async with listening(app) as address, httpx2.AsyncClient(base_url=address) as plain, sdk(address) as client:
        assert (await plain.get("/live")).status_code == 200
        assert (await plain.get("/ready")).status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            await client.images.generate(prompt="a")
        assert caught.value.status_code == 503
        async with engine:
            assert [(await plain.get(path)).status_code for path in ("/ready", "/health")] == [200, 200]
            app.state.server.draining = True
            assert (await plain.get("/ready")).status_code == 503
            with pytest.raises(openai.InternalServerError, match="shut down"):
                await client.images.generate(prompt="a")


async def test_it_mounts_into_another_application() -> None:
    async with FakeEngine() as engine:
        host = Starlette(routes=[Mount("/art", create_app(engine, api_keys=("k",)))])
        async with listening(host) as address, sdk(f"{address}/art", "k") as client:
            answer = await client.images.generate(prompt="a", response_format="url")
            async with httpx2.AsyncClient() as plain:
                assert (await plain.get(answer.data[0].url)).status_code == 200  # nobody can guess it
            async with httpx2.AsyncClient(headers={"Authorization": "Bearer k"}) as plain:
                assert (await plain.get(f"{address}/art/v1/models")).status_code == 200
                assert (await plain.get(f"{address}/art/v1/models", headers={"Authorization": ""})).status_code == 401


async def test_it_starts_the_engine_that_does_not_run() -> None:
    app = create_app(engine := FakeEngine())
    async with app.router.lifespan_context(app):
        engine.check_serving()
    with contextlib.suppress(Exception):
        engine.check_serving()
        raise AssertionError("it runs still")
