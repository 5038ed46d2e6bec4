"""Answers: how a generation reaches a client, whole or as server-sent events, and what a client that hangs up ends.

One task serves an HTTP request from its start to its end, and owns all that it starts.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from steploom import AsyncDiffusionEngine
from steploom.server.errors import ApiError, error_object, response_of
from steploom.server.generation import Generation
from steploom.server.running import Running
from steploom.server.settings import ServerSettings
from steploom.threads import SERVING
from steploom.web import watch_disconnect

MOST_KEYS = 256
MOST_BYTES = 64 * 1024 * 1024
"""Of images that are kept for retries."""

Say = Callable[[Any], dict[str, Any]]
"""An entry of the log as the data of an event, which is named by its ``type`` if it has one."""


def key_of(request: Request, kind: str) -> str | None:
    """The ``Idempotency-Key``, told apart by route and by whose key it is."""
    key = request.headers.get("idempotency-key")
    return f"{kind}\n{request.headers.get('authorization', '')}\n{key}" if key else None


class Joins:
    """Generations by ``Idempotency-Key``: those that run, and the newest of those that are done."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, Generation]] = OrderedDict()

    def find(self, key: str, body: str) -> Any:
        """The generation that was asked for with this key, of the class that was added with it; None if there is none.

        Args:
            key: Of :func:`key_of`.
            body: The :func:`fingerprint` of what is asked for.

        Raises:
            ApiError: 422: it asked for something else.
        """
        known = self._known.get(key)
        if known is None or known[1].error is not None:
            return None
        if known[0] != body:
            raise ApiError(
                422, "Idempotency-Key: was used for another request; draw a new one", code="idempotency_key_reused"
            )
        return known[1]

    def add(self, key: str, body: str, generation: Generation) -> None:
        """Remembers a generation; of those that are done only the newest ones."""
        self._known[key] = (body, generation)
        done = [(other, one) for other, (_, one) in reversed(self._known.items()) if one.ended]
        places, room = MOST_KEYS - len(self._known) + len(done), MOST_BYTES
        for place, (old, one) in enumerate(done):
            room -= one.weight
            if place >= places or room < 0:
                del self._known[old]


def fingerprint(body: Mapping[str, Any]) -> str:
    """What tells a decoded body from another one; files are part of it, so it is work for a thread."""
    digest = hashlib.sha256()
    _add(digest.update, body)
    return digest.hexdigest()


def _add(update: Callable[[bytes], None], value: Any) -> None:
    """Feeds a decoded body to a hash; files as they are, which may be large."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        value = [part for name in sorted(entries) for part in (name, entries[name])]
    if isinstance(value, list):
        items = cast("list[Any]", value)
        update(f"[{len(items)}".encode())
        for item in items:
            _add(update, item)
    else:
        data = value if isinstance(value, bytes) else repr(value).encode()
        update(f"{type(value).__name__}{len(data)}:".encode())
        update(data)


class Answer(Response):
    """Runs a generation, or joins one that runs, and answers with it.

    Args:
        generation: What is made.
        engine: Who makes it; None where somebody else runs the generation already.
        running: Where its requests are listed.
        settings: What happens when the client hangs up, and when a stream is silent.
        lingers: Whether it waits for a client that hung up to come back.
        whole: The body of an answer in one piece.
        say: The data of an event.
        closing: What ends a stream that has not failed.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        engine: AsyncDiffusionEngine | None,
        running: Running,
        settings: ServerSettings,
        lingers: bool,
        whole: Callable[[], dict[str, Any]],
        say: Say,
        closing: bytes = b"",
    ) -> None:
        super().__init__()
        self._generation, self._engine, self._running, self._settings = generation, engine, running, settings
        self._lingers, self._whole, self._say, self._closing = lingers, whole, say, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        generation = self._generation
        generation.watchers += 1
        async with anyio.create_task_group() as group:
            if self._engine is not None:
                group.start_soon(generation.run, self._engine, self._running)
            try:
                await self._answer(scope, receive, send)
            finally:
                generation.watchers -= 1
                generation.notify()
            if self._engine is not None:
                await self._needed()
                generation.abandon()
            group.cancel_scope.cancel()

    async def _needed(self) -> None:
        """Returns when nobody needs the generation any more."""
        generation = self._generation
        while not generation.ended and (generation.watchers or self._settings.on_disconnect == "keep"):
            await generation.changed()
        if not generation.ended and self._lingers:
            with anyio.move_on_after(self._settings.linger_s):
                while not generation.ended and not generation.watchers:
                    await generation.changed()
            if generation.watchers:
                await self._needed()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(watch_disconnect, receive, group.cancel_scope.cancel)
            await self._respond(scope, receive, send)
            group.cancel_scope.cancel()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        begins = generation.stream
        while not generation.ended and not (begins and generation.accepted):
            await generation.changed()
        if generation.error is not None:
            await response_of(generation.error)(scope, receive, send)
        elif begins:
            await self._stream(send)
        else:
            answer = await SERVING.run(lambda: JSONResponse(self._whole()))  # megabytes of text
            await answer(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """Server-sent events, each as soon as it is there and the client has taken the one before."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        generation, told = self._generation, 0
        while True:
            while told < len(generation.log):
                entry = generation.log[told]
                told += 1
                if entry is not None:
                    await _send(send, await SERVING.run(self._event, entry))
            if generation.ended:
                break
            with anyio.move_on_after(self._settings.stream_silence_s) as silence:
                await generation.changed()
            if silence.cancelled_caught:
                await _send(send, b": still here\n\n")
        if generation.error is not None:
            await _send(send, _text("error", {"type": "error", "error": error_object(generation.error)}))
        closing = self._closing if generation.error is None else b""
        await send({"type": "http.response.body", "body": closing, "more_body": False})

    def _event(self, entry: Any) -> bytes:
        data = self._say(entry)
        return _text(data.get("type"), data)


def _text(kind: str | None, data: Mapping[str, Any]) -> bytes:
    name = f"event: {kind}\n" if kind is not None else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


async def _send(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
