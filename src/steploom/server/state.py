"""ServerState: what the routes of one server share."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from steploom import AsyncDiffusionEngine, EngineError, EngineNotRunning
from steploom.server.answers import Joins
from steploom.server.errors import ApiError, invalid, outward
from steploom.server.page.channels import Channels
from steploom.server.running import Running
from steploom.server.settings import ServerSettings
from steploom.server.telemetry import Telemetry
from steploom.server.videos.store import folder_for
from steploom.server.videos.work import VideoJobs


class Asked(Protocol):
    """What fields of requests have in common."""

    model: str | None
    own: dict[str, Any]


class ServerState:
    """What the routes of one server share. An async context manager: it owns what outlives a request.

    Entering it starts the engine, if that does not run, and the jobs of ``/v1/videos``; leaving it ends both. It
    watches the engine from the beginning, since an application that was mounted may never be entered, until it is left.

    Args:
        engine: Who makes everything; the application, or whoever mounts it, starts and closes it.
        settings: What is allowed.

    Attributes:
        running: What is being made.
        joins: Generations by ``Idempotency-Key``.
        telemetry: Metrics, spans and log lines.
        videos: Jobs of ``/v1/videos``.
        channels: Connections of pages that watch, and the ticks that they see.
        stored: Images for ``response_format="url"``.
        created: Unix time.
        loading: What the engine is doing before it serves; None once it does.
        draining: Whether nothing new is taken any more.
    """

    def __init__(self, engine: AsyncDiffusionEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.running = Running()
        self.telemetry = Telemetry(engine, settings.scrape_timeout_s)
        self.joins = Joins()
        self.channels = Channels(engine, self.running, settings)
        self.stored = StoredImages(settings.stored_images, settings.stored_s)
        folder = Path(settings.video_dir) if settings.video_dir is not None else folder_for(engine.config.model)
        self.videos = VideoJobs(engine, self.running, settings, folder, self._served)
        self._held = contextlib.AsyncExitStack()
        self._observers = [*self.telemetry.observers, *([self.channels.feed] if settings.page else [])]
        self._watch()
        self.created = int(time.time())
        self.loading: str | None = None
        self.draining = False

    async def __aenter__(self) -> Self:
        """Raises:
        ConfigError: The folder of the videos cannot be used.
        EngineError: The engine cannot be started.
        """
        async with contextlib.AsyncExitStack() as stack:
            self._watch()
            stack.callback(self._look_away)
            try:
                self.engine.check_serving()
            except EngineNotRunning:
                await stack.enter_async_context(self.engine)
            await stack.enter_async_context(self.videos)
            self._held = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._held.__aexit__(kind, error, traceback)

    def _watch(self) -> None:
        told = self.engine.observers
        told.extend(one for one in self._observers if one not in told)

    def _look_away(self) -> None:
        told = self.engine.observers
        told[:] = [one for one in told if one not in self._observers]

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        """Looks away meanwhile: warming up is nobody's request."""
        self._look_away()
        try:
            yield
        finally:
            self._watch()

    def _served(self) -> tuple[str, ...]:
        return (*self.model_names, *self.lora_names)

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model itself."""
        model = self.engine.config.model
        return self.settings.model_names or (Path(model).name if Path(model).is_dir() else model,)

    @property
    def lora_names(self) -> tuple[str, ...]:
        """The adapters that are models of their own name."""
        return tuple(self.engine.config.loras or ())

    def check_serving(self) -> None:
        """Raises:
        ApiError: 503: the engine is being loaded, or the server is being shut down.
        """
        if self.draining:
            raise ApiError(503, "the server is being shut down", code="draining", headers={"Connection": "close"})
        if self.engine.draining:
            raise ApiError(503, "the server takes no new requests: what runs is to end", code="draining")
        if self.loading is not None:
            raise ApiError(503, f"the model is being loaded: {self.loading}", code="loading")

    def adapters(self, fields: Asked) -> list[tuple[str, float]] | None:
        """The adapters that a request wants, by the name of its model and by its field ``lora``.

        Raises:
            ApiError: 404: there is no such model; 400: there is no such adapter.
        """
        wanted: list[tuple[str, float]] = list(fields.own.get("lora") or ())
        names = {*self.lora_names, *self.engine.info.loras}
        for name, _ in wanted:
            if name not in names:
                known = f"there are {', '.join(sorted(names))}" if names else "this server has none"
                raise invalid(f"lora={name!r:.80}: no such adapter; {known}", "lora")
        if fields.model is None or fields.model in self.model_names:
            return wanted or None
        if fields.model in self.lora_names:
            return [(fields.model, 1.0), *(entry for entry in wanted if entry[0] != fields.model)]
        known = ", ".join((*self.model_names, *self.lora_names))
        raise ApiError(
            404, f"model={fields.model!r:.80}: no such model; there are {known}", param="model", code="model_not_found"
        )

    def not_ready(self) -> str | None:
        """Why the server cannot take requests; None if it can."""
        if self.draining or self.engine.draining:
            return "draining"
        if self.loading is not None:
            return self.loading
        try:
            self.engine.check_serving()
        except EngineError as error:
            return outward(error)
        if (resting := self.resting()) is not None:
            return resting
        return None if "serves" in self.engine.workers else self.recovering()

    def resting(self) -> str | None:
        """Why an engine that is well makes nothing: somebody has told it so."""
        return "paused" if self.engine.paused else "asleep" if self.engine.asleep else None

    def recovering(self) -> str | None:
        """What a worker was lost by that is being replaced; others may serve meanwhile, or requests wait. Else None."""
        fault = self.engine.recovering
        return None if fault is None else f"recovering: {outward(fault)}"


class StoredImages:
    """Images under names that cannot be guessed: the newest ones, for a while.

    Args:
        most: How many, at most.
        seconds: How long.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._images: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()

    def add(self, data: bytes, kind: str) -> str:
        """Keeps ``data``, and returns its name."""
        self._drop_old()
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._images[name] = (time.monotonic(), data, kind)
        while len(self._images) > self._most:
            self._images.popitem(last=False)
        return name

    def find(self, name: str) -> tuple[bytes, str] | None:
        """The image and its format, if it is still there."""
        self._drop_old()
        found = self._images.get(name)
        return found[1:] if found else None

    def _drop_old(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._images and next(iter(self._images.values()))[0] < oldest:
            self._images.popitem(last=False)
