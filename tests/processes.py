"""What tests ask of processes that should have ended, and of folders that should be empty."""

from __future__ import annotations

import contextlib
from pathlib import Path

import anyio.to_thread
import psutil


async def gone(worker: psutil.Process) -> None:
    """Returns when the process has ended, whoever its parent is."""
    with contextlib.suppress(psutil.NoSuchProcess):
        await anyio.to_thread.run_sync(worker.wait, 20)


def content(folder: Path) -> list[Path]:
    """What lies in a folder."""
    return list(folder.iterdir())
