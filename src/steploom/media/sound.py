"""Sound files: WAV by the standard library, compressed ones by PyAV (the extra ``video``)."""

from __future__ import annotations

import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from steploom.errors import ConfigError
from steploom.media.whole import replaced

CODECS = {".wav": "", ".flac": "flac", ".mp3": "libmp3lame", ".m4a": "aac", ".aac": "aac", ".ogg": "libopus",
          ".opus": "libopus"}  # fmt: skip
"""The codec for each ending."""

_OPUS_RATE = 48000
_LOUDEST = 32767


def write(
    waves: Sequence[Any], path: Path, sampling_rate: int | None, numbered: Callable[[Path, int], list[Path]]
) -> list[Path]:
    """Saves waves ``[channels, samples]`` in -1..1.

    Raises:
        ConfigError: Nobody said how many samples a second has, or the format cannot hold so many.
    """
    if not sampling_rate:
        raise ConfigError(f"{path}: the pipeline does not say its sampling rate; give sampling_rate=")
    files = numbered(path, len(waves))
    for file, one in zip(files, waves, strict=True):
        if file.suffix.lower() == ".wav":
            _write_wav(one, file, sampling_rate)
        else:
            _write_coded(one, file, sampling_rate)
    return files


def _write_wav(samples: Any, path: Path, sampling_rate: int) -> None:
    """16-bit PCM."""
    with replaced(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(int(sampling_rate))
        file.writeframes((samples * _LOUDEST).round().astype("<i2").T.tobytes())


def _write_coded(samples: Any, path: Path, sampling_rate: int) -> None:
    from steploom.media import video

    library = video.library()
    if not samples.shape[1]:
        raise ConfigError(f"{path}: the sound has no samples; {path.suffix} holds at least some, and .wav none as well")
    try:
        with replaced(path) as part, library.open(str(part), "w") as container:
            stream = add_stream(container, CODECS[path.suffix.lower()], samples.shape[0], sampling_rate)
            encode(library, container, stream, samples, sampling_rate)
            container.close()
            if not part.stat().st_size:
                count = samples.shape[1]
                raise ConfigError(f"{path}: a sound of {count} samples is too short for {path.suffix}; use .wav")
    except library.FFmpegError as error:
        raise ConfigError(
            f"{path}: {path.suffix} cannot hold sound of {sampling_rate} samples per second ({error}); use .wav"
        ) from None


def add_stream(container: Any, codec: str, channels: int, sampling_rate: int) -> Any:
    """A stream for a wave; of more than two channels the first two are kept."""
    rate = _OPUS_RATE if codec == "libopus" else int(sampling_rate)
    return container.add_stream(codec, rate=rate, layout="mono" if channels == 1 else "stereo")


def encode(library: Any, container: Any, stream: Any, samples: Any, sampling_rate: int) -> None:
    """Writes a wave ``[channels, samples]`` into a stream of an open file."""
    import numpy

    layout = "mono" if samples.shape[0] == 1 else "stereo"
    frame = library.AudioFrame.from_ndarray(numpy.ascontiguousarray(samples[:2]), format="fltp", layout=layout)
    frame.sample_rate = int(sampling_rate)
    frame.pts, frame.time_base = 0, Fraction(1, int(sampling_rate))
    for packet in stream.encode(frame):
        container.mux(packet)
    for packet in stream.encode(None):
        container.mux(packet)
