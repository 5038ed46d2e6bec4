"""VideoStore: jobs in a SQLite file, and their pictures and videos beside it. All of it blocks; one thread at a time.

::

    FOLDER/lock           held by the one process that uses the folder
    FOLDER/jobs.sqlite3   one row for each job
    FOLDER/files/         ID.mp4, ID.webp (thumbnail), ID.jpg (spritesheet), ID.input (the picture that it starts from)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from steploom.config import state_folder
from steploom.errors import ConfigError
from steploom.server.videos.job import PREFIX, Job

VERSION = 1
_TABLE = """
CREATE TABLE jobs (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created INTEGER NOT NULL,
    job TEXT NOT NULL
)
"""
VARIANTS = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".jpg"}
"""What clients may download, and the ending of its file."""
_INPUT = ".input"
_PART = "part-"


class VideoStore:
    """Jobs and files of one folder, which belongs to one process at a time.

    Args:
        folder: Made if it is not there, for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = folder / "files"
        self._lock: IO[str] | None = None
        self._database: sqlite3.Connection | None = None

    def open(self) -> list[Job]:
        """Takes the folder, drops what an interrupted process has left half done, and returns all jobs, oldest first.

        Raises:
            ConfigError: The folder cannot be used, is in use, or was written by a later version.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(mode=0o700, exist_ok=True)
            self._lock = _take(self.folder / "lock")
            jobs = self._read()
            self._tidy(jobs)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise ConfigError(
                f"video_dir={str(self.folder)!r}: cannot be used ({error}); give another folder"
            ) from None
        except ConfigError:
            self.close()
            raise
        return jobs

    def _read(self) -> list[Job]:
        file = self.folder / "jobs.sqlite3"
        file.touch(mode=0o600)
        database = self._database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise ConfigError(f"video_dir={str(self.folder)!r}: was written by a later version; give another folder")
        if version == 0:
            database.executescript(f"BEGIN; {_TABLE}; PRAGMA user_version = {VERSION}; COMMIT")
        return [Job.of(text) for (text,) in database.execute("SELECT job FROM jobs ORDER BY place")]

    def _tidy(self, jobs: Iterable[Job]) -> None:
        """Deletes files of jobs that are not there, and parts of files; of jobs that are to be made, what was made."""
        kept = {self.file(job, variant).name for job in jobs if job.status == "completed" for variant in VARIANTS}
        kept |= {self._input(job).name for job in jobs if job.pictured}
        for file in self._files.iterdir():
            if file.name.startswith((PREFIX, _PART)) and file.name not in kept:
                file.unlink()

    def close(self) -> None:
        """Gives the folder back."""
        if self._database is not None:
            self._database.close()
        if self._lock is not None:
            self._lock.close()
        self._database = self._lock = None

    def put(self, *jobs: Job) -> None:
        """Stores jobs as they are now: all of them, or none."""
        assert self._database is not None
        rows = [(job.id, job.status, job.created, job.text()) for job in jobs]
        self._database.execute("BEGIN")
        try:
            self._database.executemany(
                "INSERT INTO jobs (id, status, created, job) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET status = excluded.status, job = excluded.job",
                rows,
            )
        except sqlite3.Error:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def add(self, job: Job, picture: bytes | None) -> None:
        """Stores a job, and the picture that it starts from, if that is not stored yet."""
        if picture is not None:
            part = self.part(job, _INPUT)
            part.write_bytes(picture)
            _settle(part, self._input(job))
        self.put(job)

    def remove(self, jobs: Iterable[Job]) -> None:
        """Forgets jobs, and deletes their files."""
        assert self._database is not None
        for job in jobs:
            self._database.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
            self.clear(job)

    def fail(self, job: Job) -> None:
        """Stores a job that has failed, and deletes what there was of it."""
        self.clear(job)
        self.put(job)

    def clear(self, job: Job) -> None:
        """Deletes the files of a job, and parts of them."""
        for file in (*(self.file(job, variant) for variant in VARIANTS), self._input(job)):
            file.unlink(missing_ok=True)
            self.part(job, file.suffix).unlink(missing_ok=True)

    def picture(self, job: Job) -> bytes | None:
        """The picture that a job starts from.

        Raises:
            FileNotFoundError: It is not there any more.
        """
        return self._input(job).read_bytes() if job.pictured else None

    def file(self, job: Job, variant: str) -> Path:
        """Where a variant of the video is, once it is done."""
        return self._files / f"{job.id}{VARIANTS[variant]}"

    def part(self, job: Job, ending: str) -> Path:
        """Where a file is while it is written."""
        return self._files / f"{_PART}{job.id}{ending}"

    def settle(self, job: Job) -> int:
        """Gives the files that were written their names, the video's last; returns their size in bytes."""
        for variant in reversed(VARIANTS):
            _settle(self.part(job, VARIANTS[variant]), self.file(job, variant))
        return sum(self.file(job, variant).stat().st_size for variant in VARIANTS)

    def _input(self, job: Job) -> Path:
        return self._files / f"{job.id}{_INPUT}"


def folder_for(model: str) -> Path:
    """Where the videos of a model are stored if nobody says.

    Raises:
        ConfigError: This user has no home.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip(".-")[:40]
    try:
        state = state_folder()
    except ConfigError as error:
        raise ConfigError(f"video_dir: {error}, or give the folder (--video-dir)") from None
    return state / "videos" / f"{name or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _take(file: Path) -> IO[str]:
    """Locks the folder; the lock ends with the process, however that ends."""
    lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"video_dir={str(file.parent)!r}: another server keeps its videos there; give this one a folder of its own "
            "(--video-dir)"
        ) from None
    return lock


def _settle(part: Path, file: Path) -> None:
    """Gives a file its name once all of it is on the disk."""
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(file)
