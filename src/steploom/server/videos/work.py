"""VideoJobs: all jobs of a server, and the tasks that make them.

What is stored is stored before it is said: a job is in the store before its client has its id, and its file has its
name before anybody is told that it is there. So a process may be killed at any time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup, TaskStatus

from steploom import (
    AsyncDiffusionEngine,
    DiffusionOutput,
    EngineError,
    EngineNotRunning,
    QueueFull,
    RequestCancelled,
    SteploomError,
    media,
)
from steploom.server.errors import RETRY_AFTER_S, ApiError
from steploom.server.running import Running
from steploom.server.settings import ServerSettings
from steploom.server.videos import pictures
from steploom.server.videos.job import Job
from steploom.server.videos.live import Live
from steploom.server.videos.shelf import Shelf

log = logging.getLogger("steploom.server")

MAX_ATTEMPTS = 5
"""How often a job is begun, at most, by processes that are killed or whose engine dies."""

_ENCODERS = 2
"""Videos that are written at the same time."""


class VideoJobs:
    """All jobs of a server. An async context manager: jobs are made while it is held.

    Args:
        engine: Who makes them; runs before this is entered.
        running: Where their requests are listed.
        settings: How many, how large, and for how long.
        folder: Where they are stored.
        models: What clients may call the model.
    """

    def __init__(
        self,
        engine: AsyncDiffusionEngine,
        running: Running,
        settings: ServerSettings,
        folder: Path,
        models: Callable[[], Collection[str]],
    ) -> None:
        self._engine, self._running, self._settings, self._models = engine, running, settings, models
        self.shelf = Shelf(folder, settings)
        self._live: dict[str, Live] = {}
        self._pending: dict[str, anyio.Event] = {}
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        """Opens the store, and goes on with what was not done. Does nothing for a model that makes no videos.

        Raises:
            ConfigError: The folder cannot be used, or PyAV is not installed.
        """
        if self._group is not None:
            raise RuntimeError("the videos are held already: enter once")
        if not self.makes_videos:
            return self
        media.check(Path("video.mp4"))
        self._encoders = anyio.CapacityLimiter(_ENCODERS)
        unfinished = await self.shelf.open()
        self._live = {job.id: Live(accepted=True) for job in unfinished}
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self.shelf.expire)
        for job in unfinished:
            self._group.start_soon(self._work, job, None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends everything that runs, and leaves it to the next process."""
        group, self._group = self._group, None
        if group is None:
            return
        group.cancel_scope.cancel()
        try:
            await group.__aexit__(None, None, None)
        finally:
            with anyio.CancelScope(shield=True):
                await self.shelf.stored(self._leave)

    def _leave(self) -> None:
        """What was not done is the next process's; an end that was announced is no attempt."""
        left = [(job, live) for name, live in self._live.items() if (job := self.shelf.get(name)) is not None]
        for job, live in left:
            job.attempts -= 0 if live.blamed or not live.counted else 1
        try:
            self.shelf.store.put(*(job for job, _ in left))
        except sqlite3.Error:
            log.exception("what was not done of the videos could not be stored")
        finally:
            self.shelf.store.close()

    @property
    def makes_videos(self) -> bool:
        """Whether the model does, as far as is known."""
        return "videos" in (self._engine.info.makes or ("videos",))

    def check_serving(self) -> None:
        """Raises:
        ApiError: 503: nobody owns the jobs.
        """
        if self._group is None:
            raise ApiError(
                503, "videos are not made here: the application that holds this server has to enter it "
                "(async with app.state.server), or they are being shut down", code="not_started",
            )  # fmt: skip

    def find(self, name: str, owner: str | None) -> Job:
        """A job of an owner.

        Raises:
            ApiError: 404: there is none.
        """
        job = self.shelf.get(name)
        if job is None or job.owner != owner:
            raise ApiError(404, f"no video {name!r:.80}: never asked for, deleted or expired", code="not_found")
        return job

    def shown(self, job: Job) -> dict[str, Any]:
        """A job as clients see it now."""
        live = self._live.get(job.id)
        return job.shown(live.step, live.total) if live is not None else job.shown()

    async def picture_of(self, job: Job | None) -> bytes | None:
        """The picture that a job starts from; None without one.

        Raises:
            ApiError: 404: it is not there any more.
        """
        if job is None or not job.pictured:
            return None
        try:
            return await self.shelf.stored(self.shelf.store.picture, job)
        except FileNotFoundError:
            raise ApiError(404, f"the picture of video {job.id} is gone", code="not_found") from None

    async def once(self, key: str, body: str, create: Callable[[], Awaitable[Job]]) -> Job:
        """The job that was asked for with an ``Idempotency-Key``, or else the one that ``create`` makes.

        Raises:
            ApiError: 422: the key was used for something else.
        """
        while key in self._pending:
            await self._pending[key].wait()
        known = self.shelf.asked_with(key)
        if known is not None and known.body != body:
            raise ApiError(
                422, "Idempotency-Key: was used for another request; draw a new one", code="idempotency_key_reused"
            )
        if known is not None:
            return known
        self._pending[key] = anyio.Event()
        try:
            return await create()
        finally:
            self._pending.pop(key).set()

    async def create(self, job: Job, picture: bytes | None) -> None:
        """Takes on a new job; it is stored, and waits or runs, when this returns.

        Raises:
            InvalidRequest: It does not fit the model or the limits.
            QueueFull: Too much waits already.
            ApiError: 429, likewise; 503: it cannot be stored, or nobody owns the jobs.
        """
        self.check_serving()
        assert self._group is not None
        job.bytes = len(picture or b"")
        unfinished, most = len(self._live), min(self._settings.max_unfinished_videos, self._settings.max_videos)
        if unfinished >= most:
            raise ApiError(
                429, f"{unfinished} videos wait or run, at most {most} may; try again later", code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )  # fmt: skip
        self._live[job.id] = Live(accepted=False)
        try:
            with anyio.CancelScope(shield=True):  # all of it or nothing, if the client hangs up meanwhile
                await self._group.start(self._work, job, picture)
        except BaseException as error:
            del self._live[job.id]
            if isinstance(error, (OSError, sqlite3.Error)) and not isinstance(error, SteploomError):
                raise ApiError(503, f"the video cannot be stored: {error}", code="storage_failed") from error
            raise
        await self.shelf.make_room()

    async def delete(self, job: Job) -> None:
        """Ends a job, if it is not done, and forgets it. Its slot is free by the next step."""
        live = self._live.get(job.id)
        self.shelf.hide(job)
        with anyio.CancelScope(shield=True):
            if live is not None:
                live.scope.cancel()
                await live.ended.wait()
                self._live.pop(job.id, None)
            await self.shelf.drop([job])

    async def _work(
        self, job: Job, picture: bytes | None, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """One job from its request to its file. The boundary where whatever goes wrong is recorded."""
        live = self._live[job.id]
        try:
            with live.scope:
                await self._make(job, live, picture, task_status)
        except Exception as error:
            if not live.accepted:
                raise
            await self._ended(job, live, error)
        finally:
            live.ended.set()

    async def _make(self, job: Job, live: Live, picture: bytes | None, task_status: TaskStatus[None]) -> None:
        while True:
            try:
                await self._attempt(job, live, picture, task_status)
            except QueueFull as error:
                if not live.accepted:
                    raise
                await anyio.sleep(error.retry_after_s or RETRY_AFTER_S)  # of an earlier process: it was accepted
            else:
                return

    async def _attempt(self, job: Job, live: Live, picture: bytes | None, task_status: TaskStatus[None]) -> None:
        if live.accepted:
            self._check_again(job)
            picture = await self.shelf.stored(self.shelf.store.picture, job)
        async with self._engine.stream(job.request(picture)) as stream:
            job.attempts += 1
            live.counted = True
            await self.shelf.stored(self.shelf.store.add, job, None if live.accepted else picture)
            if not live.accepted:
                live.accepted = True
                self.shelf.show(job)
                task_status.started()
            with self._running.entered(job.request(None)) as entry:
                async for event in stream:
                    entry.see(event)
                    live.see(event)
                output = await stream.result()
                entry.done(output)
                await self._complete(job, output)

    def _check_again(self, job: Job) -> None:
        """Whether a job of an earlier process can be begun once more."""
        if job.attempts >= MAX_ATTEMPTS:
            raise ApiError(
                500, f"the server died {job.attempts} times while the video waited or was made", code="interrupted"
            )
        if job.model not in self._models():
            raise ApiError(
                400, f"model={job.model!r:.80}: was replaced by {', '.join(self._models())} before the video was made",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def _complete(self, job: Job, output: DiffusionOutput) -> None:
        """Writes the files, and then says that they are there."""
        written = await to_thread.run_sync(pictures.write, self.shelf.store, job, output, limiter=self._encoders)
        job = job.completed_as(written.size, written.frames, written.bytes, self._settings.video_ttl_s)
        if job.bytes > self._settings.max_video_bytes:
            raise ApiError(
                500, f"the video has {job.bytes} bytes, all of them together may have "
                f"{self._settings.max_video_bytes}; ask for a shorter or smaller one", code="too_large",
            )  # fmt: skip
        await self.shelf.stored(self.shelf.store.put, job)
        await self._settle(job)

    async def _ended(self, job: Job, live: Live, error: Exception) -> None:
        """A job has failed; or the engine has ended, and the job is left to the next one."""
        drained = isinstance(error, RequestCancelled) and error.drained
        if drained or (isinstance(error, (RequestCancelled, EngineError)) and not self._engine_serves()):
            live.blamed = not isinstance(error, (RequestCancelled, EngineNotRunning))
            live.step = 0
            return
        if not isinstance(error, (SteploomError, ApiError)):
            log.error("video %s failed", job.id, exc_info=error)
        job = job.failed_for(error, self._settings.video_ttl_s)
        with contextlib.suppress(OSError, sqlite3.Error):  # then the next process finds out again
            await self.shelf.stored(self.shelf.store.fail, job)
        await self._settle(job)

    async def _settle(self, job: Job) -> None:
        """Nothing more happens to a job; what is too much is dropped."""
        if job.id not in self.shelf:
            return  # deleted meanwhile
        self.shelf.show(job)
        del self._live[job.id]
        await self.shelf.make_room()

    def _engine_serves(self) -> bool:
        try:
            self._engine.check_serving()
        except EngineError:
            return False
        return True
