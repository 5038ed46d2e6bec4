"""Shelf: all jobs that are stored, in memory and in the store, and which of them have to go."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio import to_thread

from steploom.server.settings import ServerSettings
from steploom.server.videos.job import Job
from steploom.server.videos.store import VideoStore

log = logging.getLogger("steploom.server")
T = TypeVar("T")

_LONGEST_S = 3600.0
"""After which expiry looks at the clock on the wall again, which may have been set."""


class Shelf:
    """All jobs that are stored. What clients see of them is read from memory.

    Args:
        folder: Where they are stored.
        settings: How many, how large.

    Attributes:
        store: The files.
    """

    def __init__(self, folder: Path, settings: ServerSettings) -> None:
        self._settings = settings
        self.store = VideoStore(folder)
        self._jobs: dict[str, Job] = {}
        self._changed = anyio.Event()

    async def open(self) -> list[Job]:
        """Reads what is stored, and returns what was not done.

        Raises:
            ConfigError: The folder cannot be used.
        """
        self._thread = anyio.CapacityLimiter(1)
        self._jobs = {job.id: job for job in await self.stored(self.store.open)}
        return [job for job in self._jobs.values() if not job.finished]

    def __contains__(self, name: object) -> bool:
        return name in self._jobs

    def get(self, name: str) -> Job | None:
        """A job by its id, unless it has expired."""
        job = self._jobs.get(name)
        return None if job is None or _expired(job, time.time()) else job

    def owned(self, owner: str | None) -> list[Job]:
        """The jobs of an owner, oldest first."""
        now = time.time()
        return [job for job in self._jobs.values() if job.owner == owner and not _expired(job, now)]

    def asked_with(self, key: str) -> Job | None:
        """The job of an ``Idempotency-Key``."""
        return next((job for job in self._jobs.values() if job.key == key and not _expired(job, time.time())), None)

    def show(self, job: Job) -> None:
        """From now on a job is seen as it is now."""
        self._jobs[job.id] = job
        self._changed.set()
        self._changed = anyio.Event()

    def hide(self, job: Job) -> None:
        """Nobody shall see a job any more."""
        self._jobs.pop(job.id, None)

    async def drop(self, jobs: Iterable[Job]) -> None:
        """Forgets jobs, and deletes their files."""
        gone = list(jobs)
        for job in gone:
            self.hide(job)
        if not gone:
            return
        try:
            await self.stored(self.store.remove, gone)
        except (OSError, sqlite3.Error):
            log.exception("%d videos could not be deleted", len(gone))

    async def make_room(self) -> None:
        """Drops the oldest finished jobs, as far as there are too many, or too many bytes."""
        count, size = len(self._jobs), sum(job.bytes for job in self._jobs.values())
        dropped: list[Job] = []
        for job in sorted((job for job in self._jobs.values() if job.finished), key=lambda job: job.expires or 0.0):
            if count <= self._settings.max_videos and size <= self._settings.max_video_bytes:
                break
            dropped.append(job)
            count, size = count - 1, size - job.bytes
        await self.drop(dropped)

    async def expire(self) -> None:
        """Drops jobs when their time is over, and not before; never returns."""
        while True:
            now = time.time()
            await self.drop([job for job in self._jobs.values() if _expired(job, now)])
            times = [job.expires for job in self._jobs.values() if job.expires is not None]
            wait_s = min(times, default=now + _LONGEST_S) - time.time()
            with anyio.move_on_after(min(_LONGEST_S, max(0.0, wait_s))):
                await self._changed.wait()

    async def stored(self, call: Callable[..., T], *args: Any) -> T:
        """Whatever the store does, one after the other, in a thread."""
        return await to_thread.run_sync(call, *args, limiter=self._thread)


def _expired(job: Job, now: float) -> bool:
    return job.expires is not None and job.expires <= now
