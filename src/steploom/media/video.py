"""Video files by PyAV (the extra ``video``)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from steploom.errors import ConfigError
from steploom.media import sound
from steploom.media.whole import replaced

log = logging.getLogger(__name__)

CODECS = {".mp4": ("libx264", "aac"), ".mov": ("libx264", "aac"), ".mkv": ("libx264", "aac"),
          ".webm": ("libvpx-vp9", "libopus")}  # fmt: skip
"""Codecs of pictures and of sound for each ending."""

_QUALITY = "18"
_MOST_PARTS = 65535


def library() -> Any:
    """PyAV.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("av")
    except ImportError:
        raise ConfigError(
            "video and compressed sound are written by PyAV, which is not installed: pip install 'steploom[video]' "
            "(.gif, .webp and .wav need nothing)"
        ) from None


def write(frames: Sequence[Any], path: Path, frame_rate: float, wave: Any = None, sampling_rate: int = 0) -> None:
    """Saves frames as one video.

    Args:
        frames: ``[height, width, 3]`` of uint8 each. H.264's colours are stored for blocks of 2x2 pixels: an odd width
            or height grows by one, by repeating the last column or row.
        path: Its ending is one of :data:`CODECS`.
        frame_rate: Frames per second.
        wave: Its sound ``[channels, samples]`` in -1..1; None where it has none.
        sampling_rate: Samples per second of the sound.

    Raises:
        ConfigError: There is no frame, or PyAV is not installed.
    """
    import numpy

    if not frames:
        raise ConfigError(f"{path}: the pipeline made no image")
    av = library()
    height, width = frames[0].shape[:2]
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    if height % 2 or width % 2:
        log.info("%s: %dx%d became %dx%d, since H.264 takes even sides", path, width, height, width + width % 2,
                 height + height % 2)  # fmt: skip
    pictures, sounds = CODECS[path.suffix.lower()]
    with replaced(path) as part, av.open(str(part), "w") as container:
        stream = container.add_stream(pictures, rate=Fraction(frame_rate).limit_denominator(_MOST_PARTS))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.options = {"crf": _QUALITY, **({"b:v": "0"} if pictures == "libvpx-vp9" else {})}
        audio = None if wave is None else sound.add_stream(container, sounds, wave.shape[0], sampling_rate)
        for frame in frames:
            whole = av.VideoFrame.from_ndarray(numpy.pad(frame, odd, mode="edge"), format="rgb24")
            for packet in stream.encode(whole):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if audio is not None:
            sound.encode(av, container, audio, wave, sampling_rate)
