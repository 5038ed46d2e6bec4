"""Generation: the images of one HTTP request, each a request of the engine, and the log of what became of them.

Whoever runs it fills the log; whoever answers a client reads it, from its beginning, at the client's own speed. So a
request that is sent again with the same ``Idempotency-Key`` reads the log of the first one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypeGuard

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream
from PIL import Image

from steploom import (
    AsyncDiffusionEngine,
    DiffusionOutput,
    DiffusionRequest,
    EngineError,
    InvalidRequest,
    RequestCancelled,
    StepEvent,
    SteploomError,
)
from steploom.requests import Event
from steploom.server.errors import ApiError
from steploom.server.fields import MAX_PARTIAL_IMAGES, ImageFields, param_of
from steploom.server.pictures import encode
from steploom.server.running import Running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial:
    """A preview of one of the images.

    Attributes:
        image: Which of the images, from 0.
        index: Which preview of it, from 0.
        step: Steps done.
        total: Steps in all, if known.
        seed: Of the image.
        data: The file.
        size: Width and height.
    """

    image: int
    index: int
    step: int
    total: int | None
    seed: int | None
    data: bytes
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed:
    """One of the images, done; attributes as of :class:`Partial`. ``flagged``: the safety checker held it back."""

    image: int
    steps: int
    seed: int | None
    data: bytes
    size: tuple[int, int]
    flagged: bool = False


class Generation:
    """The images of one HTTP request.

    Args:
        fields: What was asked for.
        requests: One request of the engine for each image.
        size: Width and height that the images will have, as far as known: previews get that size.

    Attributes:
        log: What has happened so far, in order; at most ``partial_images + 1`` entries for each image.
        created: Unix time.
        error: Why it failed.
        watchers: Clients that wait for it.
    """

    def __init__(self, fields: ImageFields, requests: Sequence[DiffusionRequest], size: tuple[int, int] | None) -> None:
        self.fields = fields
        self.requests = requests
        self.log: list[Partial | Completed] = []
        self.created = int(time.time())
        self.error: Exception | None = None
        self.watchers = 0
        self._size = size
        self._accepted = 0
        self._ended = False
        self._changed = anyio.Event()

    @property
    def ended(self) -> bool:
        """Whether the log grows no more."""
        return self._ended

    @property
    def accepted(self) -> bool:
        """Whether the engine has accepted every one of its requests, so that a stream may begin."""
        return self._accepted == len(self.requests)

    async def changed(self) -> None:
        """Returns when the log has grown, has ended, or a watcher came or went."""
        await self._changed.wait()

    def notify(self) -> None:
        """Wakes all that wait for a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def run(self, engine: AsyncDiffusionEngine, running: Running) -> None:
        """Makes the images, all at once. The first that fails ends the others; what it was is kept in ``error``."""
        try:
            async with anyio.create_task_group() as group:
                for index, request in enumerate(self.requests):
                    group.start_soon(self._guarded, engine, running, index, request, group)
        finally:
            self._ended = True
            self.notify()

    async def _guarded(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        try:
            await self._one(engine, running, index, request, group)
        except InvalidRequest as error:
            self._fail(ApiError(error.status, str(error), param=param_of(error, self.fields), code="invalid_value"))
            group.cancel_scope.cancel()
        except RequestCancelled as error:
            self._fail(_why_cancelled(engine, error))
            group.cancel_scope.cancel()
        except (SteploomError, ApiError) as error:
            self._fail(error)
            group.cancel_scope.cancel()

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error.with_traceback(None)

    async def _one(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        """Makes one image. Its previews are encoded beside it, so that no event is missed meanwhile."""
        sender, receiver = anyio.create_memory_object_stream[StepEvent](MAX_PARTIAL_IMAGES)
        shown, previews = anyio.Event(), 0
        group.start_soon(self._show, index, request, receiver, shown)
        with sender, running.entered(request, self.fields) as entry:
            async with engine.stream(request) as stream:
                self._accepted += 1
                self.notify()
                async for event in stream:
                    entry.see(event)
                    if previews < self.fields.partial_images and _shows(event):
                        sender.send_nowait(event)
                        previews += 1
                output = await stream.result()
            entry.done(output)
        await shown.wait()
        self._add(await self._completed(index, output))

    async def _show(
        self, image: int, request: DiffusionRequest, events: MemoryObjectReceiveStream[StepEvent], shown: anyio.Event
    ) -> None:
        """Encodes the previews of one image, in order."""
        with events:
            index = 0
            async for event in events:
                size = self._size or event.preview.size
                data = await encode(event.preview, self.fields, size)
                step, total = event.step, event.total_steps
                seed = request.seed
                self._add(Partial(image=image, index=index, step=step, total=total, seed=seed, data=data, size=size))
                index += 1
        shown.set()

    async def _completed(self, index: int, output: DiffusionOutput) -> Completed:
        picture = _first(output)
        verdict = getattr(output.output, "nsfw_content_detected", None)
        data = await encode(picture, self.fields)
        return Completed(
            image=index, steps=output.timings.steps, seed=output.seed, data=data, size=picture.size,
            flagged=bool(verdict and verdict[0]),
        )  # fmt: skip

    def _add(self, entry: Partial | Completed) -> None:
        self.log.append(entry)
        self.notify()


def _why_cancelled(engine: AsyncDiffusionEngine, error: RequestCancelled) -> Exception:
    """A closed engine has cancelled everything: another server, or this one later, may do what was asked."""
    try:
        engine.check_serving()
    except EngineError:
        return ApiError(503, "the server was shut down before the request was done", code="draining")
    return error


def _shows(event: Event) -> TypeGuard[StepEvent]:
    """Whether the event has a preview that is not the finished image already."""
    return isinstance(event, StepEvent) and event.preview is not None and event.step != event.total_steps


def _first(output: DiffusionOutput) -> Image.Image:
    if not output.has("images"):
        raise ApiError(400, "this model makes no images", param="model", code="unsupported_model")
    pictures: Any = output.images
    return pictures[0]
