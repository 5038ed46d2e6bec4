"""Channels: one connection of a page, over which come the ticks and all images that the page has asked for.

A browser opens six connections to a server, whatever the number of its tabs. A page that held one for each image would
stop at the sixth, without one left to cancel with. So it holds one, and hands requests for images over to it.
"""

from __future__ import annotations

import json
from typing import Any

import anyio
from anyio.abc import TaskGroup
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from steploom import AsyncDiffusionEngine
from steploom.server.answers import Say
from steploom.server.errors import ApiError, error_object, response_of
from steploom.server.generation import Generation
from steploom.server.page.ticks import TickFeed
from steploom.server.running import Running
from steploom.server.settings import ServerSettings
from steploom.threads import SERVING
from steploom.web import watch_disconnect

HEADER = "steploom-channel"
"""Names the channel over which the images of a request are to come."""

LONGEST_NAME = 64
PACE_S = 0.04
"""From one write to the next, at least: a hundred fast ticks a second are four writes of 25 ticks, not a hundred."""

AT_ONCE = 50
"""Entries of one write, at most."""


class Channels:
    """The open channels of a server.

    Args:
        engine: Who makes the images.
        running: Where requests are listed.
        settings: How many may be open, for how long, and what happens when a client hangs up.

    Attributes:
        feed: The ticks.
        settings: As given.
    """

    def __init__(self, engine: AsyncDiffusionEngine, running: Running, settings: ServerSettings) -> None:
        self.feed = TickFeed()
        self._engine, self._running, self.settings = engine, running, settings
        self._open: dict[str, Channel] = {}
        self._count = 0

    def open(self, name: str | None, after: int) -> Channel:
        """The answer that is a new channel; without a name nothing can be handed over to it.

        Raises:
            ApiError: 429: too many are open; 409: there is one of that name; 400: the name is too long.
        """
        if self._count >= self.settings.max_watchers:
            raise ApiError(429, f"{self._count} pages watch already; close one", code="too_many_watchers")
        if name is not None and len(name) > LONGEST_NAME:
            raise ApiError(400, f"channel: at most {LONGEST_NAME} characters", param="channel", code="invalid_value")
        if name in self._open:
            raise ApiError(409, "channel: is open already; draw another name", param="channel", code="channel_open")
        return Channel(self, name, after)

    def entered(self, channel: Channel) -> None:
        """It is open now."""
        self._count += 1
        if channel.name is not None:
            self._open[channel.name] = channel

    def left(self, channel: Channel) -> None:
        """It is open no more."""
        self._count -= 1
        self.retire(channel)

    def retire(self, channel: Channel) -> None:
        """Nothing can be handed over to it any more."""
        if channel.name is not None and self._open.get(channel.name) is channel:
            del self._open[channel.name]

    async def hand_over(self, name: str, generation: Generation, say: Say) -> Response:
        """Has a channel run ``generation``, and returns what to answer once it was accepted, or refused."""
        channel = self._open.get(name)
        if channel is None:
            raise ApiError(409, f"{HEADER}: no such channel is open; open it first", code="no_channel")
        channel.follow(generation, say)
        while not generation.accepted and not generation.ended:
            await generation.changed()
        if generation.error is not None and not generation.accepted and not generation.abandoned:
            return response_of(generation.error)
        if not generation.accepted:
            raise ApiError(409, f"{HEADER}: the channel was closed meanwhile", code="no_channel")
        data = [{"id": one.request_id, "object": "request", "seed": one.seed} for one in generation.requests]
        return JSONResponse({"object": "list", "data": data}, 202)

    async def run(self, generation: Generation) -> None:
        """Makes its images."""
        await generation.run(self._engine, self._running)

    @property
    def keeps(self) -> bool:
        """Whether what was begun is finished although its client is gone."""
        return self.settings.on_disconnect == "keep"


class _Followed:
    """A generation, and how much of its log was told."""

    def __init__(self, generation: Generation, say: Say) -> None:
        self.generation, self.told = generation, 0
        self._say = say

    def text(self, entry: Any) -> bytes:
        """An entry of the log as an event; megabytes, perhaps."""
        return _event(self._say(entry))


class Channel(Response):
    """An open channel: owns the generations that were handed over to it, which end with it.

    Args:
        channels: Among which it is.
        name: Drawn by the page, and known to nobody else; None is one that only shows ticks.
        after: The last entry of the feed that the page has seen.
    """

    def __init__(self, channels: Channels, name: str | None, after: int) -> None:
        super().__init__()
        self.name = name
        self._channels, self._feed = channels, channels.feed
        self._after = after if after <= self._feed.count else 0
        self._followed: list[_Followed] = []
        self._group: TaskGroup | None = None
        self._changed = anyio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        async with anyio.create_task_group() as group:
            self._group = group
            self._channels.entered(self)
            try:
                await self._serve(receive, send)
            finally:
                self._channels.left(self)
            while self._channels.keeps and not all(one.generation.ended for one in self._followed):
                await self._changed.wait()
            group.cancel_scope.cancel()

    async def _serve(self, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(watch_disconnect, receive, group.cancel_scope.cancel)
            group.start_soon(self._follow_feed)
            await self._write(send)
            group.cancel_scope.cancel()

    def follow(self, generation: Generation, say: Say) -> None:
        """Runs ``generation``, and tells what becomes of it."""
        assert self._group is not None
        self._followed.append(_Followed(generation, say))
        self._group.start_soon(self._channels.run, generation)
        self._group.start_soon(self._follow, generation)

    async def _follow(self, generation: Generation) -> None:
        while not generation.ended:
            await generation.changed()
            self._notify()

    async def _follow_feed(self) -> None:
        while not self._feed.closed:
            await self._feed.changed()
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, _text("hello", {"feed": self._feed.name, "channel": self.name is not None}))
        # a server that waits for its connections to end before it does is not kept waiting for longer
        idle_s = self._channels.settings.watcher_idle_s
        ends = anyio.current_time() + idle_s
        while not self._feed.closed or self._followed:
            changed = self._changed  # of now: what happens while the client takes its time is not missed
            if self._followed:
                ends = anyio.current_time() + idle_s
            wrote = await self._write_ticks(send)
            wrote |= await self._write_images(send)
            if wrote:
                await anyio.sleep(PACE_S)
            elif not self._followed and anyio.current_time() >= ends:
                break
            else:
                silence_s = self._channels.settings.stream_silence_s
                await _wait(send, changed, silence_s if self._followed else ends - anyio.current_time())
        self._channels.retire(self)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_ticks(self, send: Send) -> bool:
        text, self._after = self._feed.read(self._after, AT_ONCE)
        if text:
            await _send(send, text)
        return bool(text)

    async def _write_images(self, send: Send) -> bool:
        wrote = False
        for one in list(self._followed):
            generation = one.generation
            ended = generation.ended
            while one.told < len(generation.log):
                entry = generation.log[one.told]
                one.told += 1
                if entry is not None:
                    await _send(send, await SERVING.run(one.text, entry))
                    wrote = True
            if ended:
                self._followed.remove(one)
                if generation.error is not None and generation.accepted:  # else it was the answer already
                    await _send(send, _event(_failed(generation, generation.error)))
                    wrote = True
        return wrote


async def _wait(send: Send, changed: anyio.Event, seconds: float) -> None:
    with anyio.move_on_after(seconds) as silence:
        await changed.wait()
    if silence.cancelled_caught:
        await _send(send, b": still here\n\n")


def _failed(generation: Generation, error: Exception) -> dict[str, Any]:
    ids = [request.request_id for request in generation.requests]
    return {"type": "error", "error": error_object(error), "request_ids": ids}


def _event(data: dict[str, Any]) -> bytes:
    return _text(data["type"], data)


def _text(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


async def _send(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
