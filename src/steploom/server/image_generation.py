"""ImageGeneration: the images of one HTTP request, each a request of the engine."""

from __future__ import annotations

import contextlib
import dataclasses
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
    GenerationFailed,
    InvalidRequest,
    StepEvent,
)
from steploom.requests import Event
from steploom.server.errors import ApiError
from steploom.server.fields import ImageFields, param_of
from steploom.server.generation import Generation
from steploom.server.notes import notes_of
from steploom.server.pictures import encode, encode_small
from steploom.server.running import Running

KEPT_PREVIEWS = 8
"""Previews of each image that wait for a slow client, at most."""

_SAME_SHAPE = 0.03
"""What the ratios of two sizes may differ by: pipelines round sizes."""


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
        kind: Its format.
        size: Width and height.
    """

    image: int
    index: int
    step: int
    total: int | None
    seed: int | None
    data: bytes
    kind: str
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


class ImageGeneration(Generation):
    """The images of one HTTP request. Its log has the newest :class:`Partial` of each, and :class:`Completed`.

    Args:
        fields: What was asked for.
        requests: One request of the engine for each image.
        sizes: Widths and heights that the images may have, as far as known: previews get the first of their shape.
    """

    def __init__(
        self, fields: ImageFields, requests: Sequence[DiffusionRequest], sizes: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(requests, stream=fields.stream)
        self.fields = fields
        self._sizes = sizes

    @property
    def weight(self) -> int:
        """Bytes of the files in the log."""
        return sum(len(entry.data) for entry in self.log if entry is not None)

    def _param_of(self, error: InvalidRequest) -> str | None:
        return param_of(error, self.fields)

    async def _one(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        """Makes one image. Its previews are encoded beside it, so that no event is missed meanwhile."""
        sender, receiver = anyio.create_memory_object_stream[StepEvent](KEPT_PREVIEWS)
        shown, previews, fields = anyio.Event(), 0, self.fields
        group.start_soon(self._show, index, request, receiver, shown)
        with sender, running.entered(request) as entry:
            async with engine.stream(request) as stream:
                self._accept()
                async for event in stream:
                    entry.see(event)
                    if _shows(event) and (fields.preview_every or _due(event, previews, fields.partial_images)):
                        with contextlib.suppress(anyio.WouldBlock):  # steps are faster than pictures are encoded
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
                data, kind, size = await self._preview(event.preview)
                self._forget_preview(image, index - KEPT_PREVIEWS)
                self._add(
                    Partial(
                        image=image, index=index, step=event.step, total=event.total_steps, seed=request.seed,
                        data=data, kind=kind, size=size,
                    )
                )  # fmt: skip
                index += 1
        shown.set()

    async def _preview(self, picture: Image.Image) -> tuple[bytes, str, tuple[int, int]]:
        """A preview as file, its format and size: those of the image, unless there is one every few steps."""
        if self.fields.preview_every:
            return *await encode_small(picture), picture.size
        size = _fitting(picture.size, self._sizes)
        return await encode(picture, self.fields, size), self.fields.output_format, size

    def _forget_preview(self, image: int, index: int) -> None:
        """Lets go of a preview that newer ones have replaced; a client that has not read it by now is too slow."""
        for place, entry in enumerate(self.log if index >= 0 else ()):
            if isinstance(entry, Partial) and (entry.image, entry.index) == (image, index):
                self.log[place] = None

    async def _completed(self, index: int, output: DiffusionOutput) -> Completed:
        picture = _first(output)
        verdict = getattr(output.output, "nsfw_content_detected", None)
        notes = notes_of(self.fields, output.seed, picture.size) if self.fields.metadata else None
        data = await encode(picture, self.fields, notes=notes)
        return Completed(
            image=index, steps=output.timings.steps, seed=output.seed, data=data, size=picture.size,
            flagged=bool(verdict and verdict[0]),
        )  # fmt: skip


def _fitting(shape: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that a preview is brought to: a pipeline may have a size of its own, or take that of the picture."""
    if len(sizes) == 1:
        return sizes[0]
    near = (size for size in sizes if abs(size[0] * shape[1] / (size[1] * shape[0]) - 1) < _SAME_SHAPE)
    return next(near, shape)


def _shows(event: Event) -> TypeGuard[StepEvent]:
    """Whether the event has a preview that is not the finished image already."""
    return isinstance(event, StepEvent) and event.preview is not None and event.step != event.total_steps


def _due(event: StepEvent, shown: int, most: int) -> bool:
    """Whether the next of at most so many previews is due: the first after the first step, the others evenly spread."""
    return shown < most and event.step >= 1 + shown * ((event.total_steps or 1) - 1) / most


def _first(output: DiffusionOutput) -> Image.Image:
    if not output.has("images"):
        raise ApiError(400, "this model makes no images", param="model", code="unsupported_model")
    pictures: Any = output.images
    if not len(pictures):
        raise GenerationFailed("the pipeline made no image")
    return pictures[0]
