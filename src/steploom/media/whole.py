"""Files that are there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: Path) -> Generator[Path]:
    """Where to write what is to become ``path``: a file beside it, which takes its place at the end, and no sooner.

    What was at ``path`` stays if the writing fails, as on a full disk. What is no regular file (a pipe, a device) is
    written to directly, and so is a file in a folder that takes no other.

    Raises:
        OSError: It cannot be written; names ``path``.
    """
    part = None
    try:
        target = Path(os.path.realpath(path))  # through links, which stay what they are
        part = target.with_name(f"part-{secrets.token_hex(4)}{target.suffix}")
        if (target.exists() and not target.is_file()) or not _begun(part, target):
            part = None
        yield part or path
        if part is not None:
            _settle(part, target)
    except OSError as error:
        if not error.errno:  # a library's own, as of an image that a format cannot hold
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):  # a disk that refuses this as well
                part.unlink(missing_ok=True)


def _begun(part: Path, target: Path) -> bool:
    """Makes ``part``; whether there is one now, or ``target`` has to be written to as it is."""
    try:
        part.touch(exist_ok=False)
    except PermissionError:
        if not target.exists():
            raise
        return False
    if target.exists():
        shutil.copymode(target, part)
    return True


def _settle(part: Path, target: Path) -> None:
    try:
        part.replace(target)
    except OSError:  # as of a file that is mounted by itself
        shutil.copyfile(part, target)
