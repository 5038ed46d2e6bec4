"""Requests that are asked again, and requests that fail in a way that nobody foresaw, over a pretended engine."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import anyio
import httpx2
import openai
import pytest
from PIL import Image
from serving import file_of, openai_client

from steploom.server import answers, create_app, image_generation, images
from steploom.server.text import routes
from steploom.testing import FakeEngine

KEY = {"Idempotency-Key": "k"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


async def given_up(client: openai.AsyncOpenAI, engine: Any, path: str, body: dict[str, Any]) -> None:
    """Asks with a key, hangs up, and returns when nobody waits for the answer any more."""
    engine.hold()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: client.post(path, body=body, cast_to=object, options={"headers": KEY}))
        await engine.held()
        group.cancel_scope.cancel()
    with anyio.fail_after(30):
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


async def test_what_a_key_stands_for_is_told_apart_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    for module in (images, routes):
        real = module.fingerprint
        monkeypatch.setattr(module, "fingerprint", lambda body, real=real: threads.add(get_ident()) or real(body))
    for makes, path, body in (("images", "/images/generations", {"prompt": "a"}), ("text", "/chat/completions", CHAT)):
        async with openai_client(engine={"makes": makes}) as (client, _):
            await client.post(path, body=body, cast_to=object, options={"headers": KEY})
            assert threads
            assert get_ident() not in threads  # files of 64 MB take a while
            threads.clear()


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


async def test_what_is_kept_for_retries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with openai_client() as (client, _):

        async def seeds(*keys: str) -> list[int]:
            asked = [{"prompt": "a", "extra_headers": {"Idempotency-Key": key}} for key in keys]
            return [(await client.images.generate(**one)).data[0].seed for one in asked]

        first, second = await seeds("k" * 300, "k" * 300 + "l")
        assert first != second  # long keys are told apart
        assert await seeds("k" * 300, "k" * 300 + "l") == [first, second]
        monkeypatch.setattr(answers, "MOST_BYTES", 0)
        third, _, again = await seeds("x", "y", "x")
        assert third != again


class Gone:
    """A client that hangs up in the middle of its body."""

    def __init__(self, part: bytes) -> None:
        self.messages = [{"type": "http.request", "body": part, "more_body": True}, {"type": "http.disconnect"}]
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("path", ["images/generations", "images/edits", "completions", "chat/completions"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
async def test_who_hangs_up_while_asking_is_no_fault_of_ours(
    path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Gone(b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n')
    head = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": f"/v1/{path}", "headers": head, "query_string": b""}
    await create_app(FakeEngine())(scope, gone.receive, gone.send)
    refused = "completions" in path and "form" in kind  # before the body is read
    assert [message["status"] for message in gone.sent if "status" in message] == [415] * refused
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
