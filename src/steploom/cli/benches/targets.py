"""What a load is sent to: an engine in this process, or a server that has OpenAI's images API."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steploom.cli.benches.http_post import Address, Exchange
from steploom.cli.benches.load import Answer
from steploom.cli.benches.workloads import Arrival
from steploom.errors import ConfigError, EngineError, RequestError
from steploom.requests import StepEvent

if TYPE_CHECKING:
    from steploom.engine.async_engine import AsyncDiffusionEngine

PATH = "/v1/images/generations"
_SIZES = ("small", "medium", "large")
_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "ring")
_RELATIONS = ("above", "below", "to the left of", "to the right of")
_GROUNDS = ("white", "black", "gray")


@dataclasses.dataclass(frozen=True)
class Asking:
    """What every request of a load has in common.

    Attributes:
        seed: Of prompts and seeds.
        prompt: Of each; None draws a different one for each, so that no text encoder's result is known already.
        params: Further arguments of the pipeline.
        previews: Whether to ask for previews, so that there is a time to the first one.
    """

    seed: int = 0
    prompt: str | None = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    previews: bool = False

    def prompt_of(self, index: int) -> str:
        """The prompt of a request, by its index in the workload: in the built-in model's words (``demo/scene.py``)."""
        if self.prompt is not None:
            return self.prompt
        pick = random.Random(f"{self.seed} prompt {index}").choice
        one, other = (f"a {pick(_SIZES)} {pick(_COLOURS)} {pick(_SHAPES)}" for _ in range(2))
        return f"{one} {pick(_RELATIONS)} {other} on a {pick(_GROUNDS)} background"

    def seed_of(self, index: int) -> int:
        """The seed of a request."""
        return (self.seed * 1_000_003 + index) % 2**32


class EngineTarget:
    """An engine in this process.

    Args:
        engine: It runs.
        asking: What every request has in common.
    """

    def __init__(self, engine: AsyncDiffusionEngine, asking: Asking) -> None:
        self._engine, self._asking = engine, asking

    async def send(self, index: int, arrival: Arrival) -> Answer:
        """Runs one request.

        Raises:
            SteploomError: It failed.
        """
        settings: dict[str, Any] = {
            **self._asking.params,
            "seed": self._asking.seed_of(index),
            "num_inference_steps": arrival.steps,
            "width": arrival.width,
            "height": arrival.height,
            "user": arrival.user,
            "priority": arrival.priority,
            "deadline": arrival.deadline,
        }
        if arrival.images > 1:
            settings["num_images_per_prompt"] = arrival.images
        first: float | None = None
        if self._asking.previews:
            settings["preview_every"] = 1
            async with self._engine.stream(self._asking.prompt_of(index), **settings) as run:
                async for event in run:
                    if first is None and isinstance(event, StepEvent) and event.preview is not None:
                        first = time.monotonic()
                out = await run.result()
        else:
            out = await self._engine.generate(self._asking.prompt_of(index), **settings)
        timings = out.timings
        return Answer(
            steps=timings.steps,
            images=arrival.images,
            mean_batch_requests=timings.mean_batch_requests,
            first_preview_at=first,
        )


class ServerTarget:
    """A server with OpenAI's images API, steploom's own or another.

    Args:
        url: ``http://host:port``.
        asking: What every request has in common.
        api_key: Sent as bearer token; None sends none.
        model: What the server calls its model; None leaves it to the server.
        plain: Send fields of OpenAI's alone: no steps, no seed, no deadline.

    Raises:
        ConfigError: ``url`` is no address.
    """

    def __init__(
        self, url: str, asking: Asking, *, api_key: str | None = None, model: str | None = None, plain: bool = False
    ) -> None:
        self._address, self._asking, self._model, self._plain = Address(url), asking, model, plain
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        if any(not value.isprintable() for value in self._headers.values()):
            raise ConfigError("api_key: must be printable characters; it is sent in a header")

    async def send(self, index: int, arrival: Arrival) -> Answer:
        """Has one request answered.

        Raises:
            RequestError: The server refused it, or it failed there; the message begins with the status.
            EngineError: What came is no answer.
            OSError: No connection.
        """
        body = self._body(index, arrival)
        async with Exchange(self._address, PATH, body, self._headers) as exchange:
            if exchange.status != 200:
                raise RequestError(f"{exchange.status} {_said(await exchange.whole())}")
            if exchange.headers.get("content-type", "").startswith("text/event-stream"):
                images, first = await self._events(exchange)
            else:
                images, first = _images_of(await exchange.whole()), None
        return Answer(steps=0 if self._plain else arrival.steps, images=images, first_preview_at=first)

    def _body(self, index: int, arrival: Arrival) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": self._asking.prompt_of(index), "size": f"{arrival.width}x{arrival.height}"}
        if self._model is not None:
            body["model"] = self._model
        if arrival.images > 1:
            body["n"] = arrival.images
        if arrival.user is not None:
            body["user"] = arrival.user
        if self._asking.previews:
            body |= {"stream": True, "partial_images": 1}
        if not self._plain:
            body |= {**self._asking.params, "seed": self._asking.seed_of(index), "num_inference_steps": arrival.steps}
            body |= {"priority": arrival.priority} if arrival.priority else {}
            body |= {} if arrival.deadline is None else {"deadline": arrival.deadline}
        return body

    async def _events(self, exchange: Exchange) -> tuple[int, float | None]:
        """How many images came, and when the first preview did."""
        images, first = 0, None
        async with contextlib.aclosing(exchange.lines()) as lines:
            async for line in lines:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = _json(line[5:])
                kind = str(event.get("type", ""))
                if kind.endswith(".partial_image") and first is None:
                    first = time.monotonic()
                elif kind.endswith(".completed"):
                    images += 1
                elif kind == "error" or "error" in event:
                    raise RequestError(_said(line[5:]))
        if not images:
            raise EngineError("the stream ended without an image")
        return images, first


def _images_of(data: bytes) -> int:
    entries = _json(data).get("data")
    if not isinstance(entries, list) or not entries:
        raise EngineError("the answer has no images: is this an images API?")
    return len(entries)  # pyright: ignore[reportUnknownArgumentType]


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EngineError(f"the answer is not what an images API answers: {data[:80]!r}")
    return found  # pyright: ignore[reportUnknownVariableType]


def _said(data: bytes) -> str:
    """What an error object says, or the beginning of whatever came."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace")
