"""Requests that are asked again, and requests that fail in a way that nobody foresaw, over a pretended engine."""

from __future__ import annotations

from typing import Any

import anyio
import httpx2
import openai
import pytest
from PIL import Image
from serving import file_of, openai_client

from steploom.server import image_generation

KEY = {"Idempotency-Key": "k"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


async def given_up(client: openai.AsyncOpenAI, engine: Any, path: str, body: dict[str, Any]) -> None:
    """Asks with a key, hangs up, and returns when nobody waits for the answer any more."""
    engine.hold()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: client.post(path, body=body, cast_to=object, options={"headers": KEY}))
        await engine.held()
        group.cancel_scope.cancel()
    with anyio.fail_after(10):
        while (await client.get("/requests", cast_to=dict))["data"]:
            await anyio.lowlevel.checkpoint()
    engine.release()


@pytest.mark.parametrize(
    ("makes", "path", "body"),
    [
        ("images", "images/generations", {"prompt": "a"}),
        ("images", "images/generations", {"prompt": "a", "stream": True}),
        ("text", "chat/completions", CHAT),
        ("text", "completions", {"prompt": "a", "stream": True}),
    ],
)
async def test_who_comes_back_too_late_begins_anew(makes: str, path: str, body: dict[str, Any]) -> None:
    async with openai_client(engine={"makes": makes}, linger_s=0.0) as (client, engine):
        await given_up(client, engine, f"/{path}", body)
        async with httpx2.AsyncClient(base_url=str(client.base_url), headers=client.auth_headers) as plain:
            again = await plain.post(path, json=body, headers=KEY)
            assert again.status_code == 200
            assert "completed" in again.text or "b64_json" in again.text or '"finish_reason"' in again.text


async def test_edits_that_come_at_once_with_one_key_are_made_once() -> None:
    async with openai_client() as (client, engine):
        engine.hold()
        picture = file_of(Image.effect_noise((256, 256), 50))
        seeds = set()

        async def ask() -> None:
            answer = await client.images.edit(prompt="a", image=picture, extra_headers=KEY)
            seeds.add(answer.data[0].seed)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
            await engine.held()
            engine.release()
        assert len(seeds) == 1


async def test_a_fault_of_ours_is_an_error_object_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object) -> bytes:
        raise RuntimeError("a secret")

    monkeypatch.setattr(image_generation, "encode", breaks)
    async with openai_client() as (client, _):
        with pytest.raises(openai.InternalServerError, match="internal error") as whole:
            await client.images.generate(prompt="a")
        assert (whole.value.status_code, whole.value.type) == (500, "server_error")
        stream = await client.images.generate(prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="internal error") as streamed:
            [event async for event in stream]
        assert "secret" not in f"{whole.value}{streamed.value}"
        assert (await client.models.list()).data  # the connection is as good as before


async def test_what_would_fail_again_is_not_asked_again() -> None:
    async with openai_client() as (client, engine):
        submitted = []
        stream = engine.stream
        engine.stream = lambda request: submitted.append(request) or stream(request)
        retrying = client.with_options(max_retries=2)
        with pytest.raises(openai.InternalServerError, match="fail now"):
            await retrying.images.generate(prompt="fail now")
        engine.hold()
        with pytest.raises(openai.InternalServerError, match=r"timeout=0\.01"):
            await retrying.images.generate(prompt="a", extra_body={"timeout": 0.01})
        engine.release()
        assert len(submitted) == 2
