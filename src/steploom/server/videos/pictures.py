"""The files of a finished video: itself, its thumbnail, and a sheet of its frames. All of it is work for a thread."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from steploom import DiffusionOutput, GenerationFailed, media
from steploom.server.videos.job import Job
from steploom.server.videos.store import VARIANTS, VideoStore

_QUALITY = 85
_THUMBNAIL = 512
"""Pixels of the longer side of a thumbnail, at most."""
_CELL = 160
"""Pixels of the longer side of a frame in a sheet, at most."""
_CELLS, _COLUMNS = 16, 4


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a video: its ``size`` (width, height), ``frames``, and the ``bytes`` of all its files."""

    size: tuple[int, int]
    frames: int
    bytes: int


def write(store: VideoStore, job: Job, output: DiffusionOutput) -> Written:
    """Writes a job's files: under other names first, so that no half of one is ever seen.

    Raises:
        GenerationFailed: The pipeline made no video.
        OSError: They cannot be stored.
    """
    videos = media.frames_of(output.videos) if output.has("videos") else []
    if not (videos and videos[0]):
        raise GenerationFailed("the pipeline made no video")
    frames: list[Any] = videos[0]
    output.save(store.part(job, VARIANTS["video"]), frame_rate=job.fps)
    middle = media.picture(frames[len(frames) // 2])
    middle.thumbnail((_THUMBNAIL, _THUMBNAIL))
    middle.save(store.part(job, VARIANTS["thumbnail"]), quality=_QUALITY)
    _sheet(frames).save(store.part(job, VARIANTS["spritesheet"]), quality=_QUALITY)
    height, width = frames[0].shape[:2]
    return Written((width, height), len(frames), store.settle(job))


def _sheet(frames: list[Any]) -> Image.Image:
    """Frames from the first to the last, evenly spread, row by row."""
    count = min(_CELLS, len(frames))
    places = [round(index * (len(frames) - 1) / max(1, count - 1)) for index in range(count)]
    cells = [media.picture(frames[place]) for place in places]
    for cell in cells:
        cell.thumbnail((_CELL, _CELL))
    width, height = cells[0].size
    columns = min(_COLUMNS, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % columns * width, index // columns * height))
    return sheet
