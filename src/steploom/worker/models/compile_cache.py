"""The compiled code on disk, which makes the next start faster: where it is, and how it stays small."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steploom import config
from steploom.errors import ConfigError

log = logging.getLogger(__name__)

_KEPT_SHARE = 0.75
"""What is left of a cache that has grown too large: it is not to be walked again at the next file."""


def prepare(limit_bytes: int) -> Path | None:
    """Has compiled code kept, in at most ``limit_bytes``; the folder, None if the user or torch says where."""
    if not limit_bytes:
        return None
    try:
        folder = config.cache_folder() / "compile"
        folder.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        log.warning("compiled code is kept for this start only: %s", error)
        return None
    torch_s: Any = importlib.import_module("torch._inductor.runtime.runtime_utils")
    if not config.keep_compiled_in(folder, torch_s.default_cache_dir()):
        return None
    trim(folder, limit_bytes)
    return folder


def trim(folder: Path, limit_bytes: int) -> int:
    """Deletes the files that were written or read longest ago, if all are too large together; bytes that are left.

    Other workers may use the folder meanwhile: what they lack, they compile.
    """
    files = sorted(_files(folder))
    held = sum(size for _, size, _ in files)
    if held <= limit_bytes:
        return held
    for _, size, file in files:
        if held <= limit_bytes * _KEPT_SHARE:
            break
        with contextlib.suppress(OSError):
            file.unlink()
            held -= size
    return held


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another worker has deleted it
            about = file.stat()
            if file.is_file():
                yield max(about.st_atime, about.st_mtime), about.st_size, file
