"""What is saved is there whole or not at all: on a full disk, through links, and where no other file may be made.

The kernel refuses for real: no file of this process may grow (``RLIMIT_FSIZE``), as on a disk that is full.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steploom import media
from steploom.media.whole import replaced
from steploom.requests import DiffusionOutput

NOISE = np.random.default_rng(0)
PICTURES = [Image.fromarray(NOISE.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(8)]
WAVE = NOISE.uniform(-1, 1, (1, 1, 96_000)).astype(np.float32)
ENDINGS = {".png": "images", ".jpg": "images", ".gif": "frames", ".apng": "frames", ".mp4": "frames", ".webm": "frames",
           ".wav": "audios", ".mp3": "audios", ".flac": "audios", ".txt": "texts"}  # fmt: skip
OF = {"images": PICTURES[:1], "frames": [PICTURES], "audios": WAVE, "texts": ["word " * 10_000]}


def made(ending: str) -> DiffusionOutput:
    fields = {ENDINGS[ending]: OF[ENDINGS[ending]]}
    return DiffusionOutput(request_id="r", output=types.SimpleNamespace(**fields), sampling_rate=48_000)


def is_picture(file: Path) -> bool:
    with Image.open(file) as image:
        image.load()
        return image.size == (64, 64)


@contextlib.contextmanager
def no_room(most: int) -> Generator[None]:
    """No file of this process may have more bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("room", [0, 1024])
def test_a_full_disk_leaves_what_was_there_and_no_halves(ending: str, room: int, tmp_path: Path) -> None:
    old, new = tmp_path / f"old{ending}", tmp_path / f"new{ending}"
    old.write_bytes(b"what was there")
    for file in (old, new):
        with no_room(room), pytest.raises(OSError, match=r"File too large") as refused:
            made(ending).save(file)
        assert refused.value.filename == str(file)
    assert old.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [old]
    assert made(ending).save(new) == [new]
    assert new.stat().st_size > 1024


def test_a_link_stays_a_link_and_a_file_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "folder" / "real.png", tmp_path / "link.png"
    real.parent.mkdir()
    real.touch(0o640)
    link.symlink_to(real)
    made(".png").save(link)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert is_picture(real)
    plain, ours = tmp_path / "plain.png", tmp_path / "ours.png"
    plain.touch()
    made(".png").save(ours)
    assert ours.stat().st_mode == plain.stat().st_mode, "as any new file of this user"
    assert sorted(file.name for file in tmp_path.rglob("*.png")) == ["link.png", "ours.png", "plain.png", "real.png"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe.txt", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    made(".txt").save(pipe)
    reader.join()
    assert len(read[0]) == 50_001
    assert list(tmp_path.iterdir()) == [pipe]


def _refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("step", ["touch", "replace"])
def test_a_file_whose_folder_takes_no_other_is_written_to(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, on a disk that is mounted for reading, or a file that is mounted by itself."""
    file = tmp_path / "a.png"
    file.touch()
    monkeypatch.setattr(Path, step, _refuse)
    media.write(PICTURES[0], file)
    assert is_picture(file)
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as missing, replaced(tmp_path / "no" / "a.png"):
        pass
    assert missing.value.filename == str(tmp_path / "no" / "a.png")
    odd = OSError("what a library makes of it")
    with pytest.raises(OSError, match="what a library") as told, replaced(tmp_path / "a.png"):
        raise odd
    assert told.value is odd
    monkeypatch.setattr(Path, "touch", _refuse)
    with pytest.raises(PermissionError) as refused, replaced(tmp_path / "a.png"):
        pass
    assert refused.value.filename == str(tmp_path / "a.png")
