"""Files of what pipelines make: images, videos, sound, text. The ending of a file's name is its format.

Everything here takes time and blocks: call it in a thread (``await anyio.to_thread.run_sync(out.save, "out.mp4")``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steploom.errors import ConfigError
from steploom.media import images, rates, sound, video
from steploom.media.arrays import frames_of, pictures_of, waves_of
from steploom.media.images import picture, write
from steploom.media.pictures import leaves, shape_of
from steploom.media.whole import replaced

__all__ = ["check", "endings_for", "frames_of", "kinds_of", "numbered", "picture", "pictures_of", "save", "waves_of",
           "write"]  # fmt: skip

KINDS = ("images", "videos", "audios", "text")
"""What pipelines make, as outputs call it."""

ANIMATED = (".gif", ".webp", ".apng")
"""Endings of image files that hold several frames."""

TEXTS = (".txt", ".md")


def kinds_of(path: Path) -> tuple[str, ...]:
    """What a file of this name can hold, of :data:`KINDS`; nothing if its ending is not known."""
    ending = path.suffix.lower()
    if ending in video.CODECS:
        return ("videos",)
    if ending in sound.CODECS:
        return ("audios",)
    if ending in TEXTS:
        return ("text",)
    if ending in ANIMATED:
        return ("videos", "images")
    return ("images",) if images.knows(ending) else ()


def endings_for(kind: str) -> str:
    """Endings that fit one of :data:`KINDS`, for a message."""
    return {
        "images": ".png, .jpg, .webp or .gif", "videos": ".mp4, .webm, .gif or .webp",
        "audios": ".wav, .flac, .mp3 or .m4a", "text": ".txt",
    }[kind]  # fmt: skip


def check(path: Path) -> None:
    """Refuses a name that nothing could be saved under, before anything is made.

    Raises:
        ConfigError: The ending names no format, or one that needs a package that is not installed.
    """
    ending = path.suffix.lower()
    if not kinds_of(path):
        mends = "; ".join(f"{kind}: {endings_for(kind)}" for kind in KINDS)
        lacks = f"{ending!r} names no format" if ending else "the name has no ending, which says the format"
        raise ConfigError(f"{path}: {lacks}; {mends}")
    if ending in video.CODECS or (ending in sound.CODECS and ending != ".wav"):
        video.library()
    if kinds_of(path)[-1] == "images":
        images.check(path)


def numbered(path: Path, count: int) -> list[Path]:
    """``path`` if there is one file, else ``path-1``, ``path-2`` and so on."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{place}") for place in range(1, count + 1)]


def save(
    output: Any, path: str | Path, *, frame_rate: float | None = None, sampling_rate: int | None = None
) -> list[Path]:
    """Saves what an output holds of the kind that the file's ending stands for.

    Args:
        output: A :class:`~steploom.DiffusionOutput`.
        path: Where to; several images, videos or sounds are numbered ``path-1``, ``path-2`` and so on.
        frame_rate: Frames per second; None takes the request's, else the pipeline's, else 16.
        sampling_rate: Samples per second of the sound; None takes the model's.

    Returns:
        The files that were written.

    Raises:
        ConfigError: The ending names no format or does not fit the output, the output is latents, a rate is none, or a
            package is missing.
        OSError: A file cannot be written; what was there under its name stays.
    """
    path = Path(path)
    check(path)
    rate = rates.frame_rate(frame_rate, output.frame_rate)
    samples_s = rates.sampling_rate(sampling_rate, output.sampling_rate)
    kinds = kinds_of(path)
    kind = next((kind for kind in kinds if output.has(kind)), None)
    if kind is None and kinds == ("images",) and output.has("videos"):
        _refuse_latents(output, "videos", path)
        return _single_frames(output, path)
    if kind is None:
        made = [name for name in KINDS if output.has(name)]
        mend = f"it made {made[0]}: use {endings_for(made[0])}" if made else "it made nothing that can be saved"
        raise ConfigError(f"{path}: the pipeline made no {' and no '.join(kinds)}; {mend}")
    _refuse_latents(output, kind, path)
    if kind == "videos":
        return _videos(output, path, rate, samples_s)
    if kind == "audios":
        return sound.write(waves_of(output.audios), path, samples_s, numbered)
    if kind == "text":
        texts: list[Any] = output.text if isinstance(output.text, list) else [output.text]  # pyright: ignore
        files = numbered(path, len(texts))
        for file, text in zip(files, texts, strict=True):
            with replaced(file) as part:
                part.write_text(f"{text}\n", encoding="utf-8")
        return files
    pictures = pictures_of(output.images)
    files = numbered(path, len(pictures))
    for file, one in zip(files, pictures, strict=True):
        images.write(one, file)
    return files


def _refuse_latents(output: Any, kind: str, path: Path) -> None:
    """Refuses latents, which may look like pictures. Some pipelines give pictures all the same: those are PIL's."""
    if output.output_type == "latent" and any(map(shape_of, leaves(kind, getattr(output, kind)))):
        raise ConfigError(f"{path}: output_type='latent': these are latents; leave output_type as it is")


def _videos(output: Any, path: Path, rate: float, sampling_rate: int | None) -> list[Path]:
    videos = frames_of(output.videos)
    files = numbered(path, len(videos))
    waves = waves_of(output.audios) if output.has("audios") and path.suffix.lower() in video.CODECS else []
    for place, (file, frames) in enumerate(zip(files, videos, strict=True)):
        if path.suffix.lower() in video.CODECS:
            wave = waves[place] if place < len(waves) and sampling_rate else None
            video.write(frames, file, rate, wave, sampling_rate or 0)
        else:
            images.animate(frames, file, rate)
    return files


def _single_frames(output: Any, path: Path) -> list[Path]:
    """Videos of one frame are images."""
    videos = frames_of(output.videos)
    longest = max(map(len, videos), default=0)
    if longest != 1:
        raise ConfigError(f"{path}: the pipeline made {longest or 'no'} frames; use {endings_for('videos')}")
    files = numbered(path, len(videos))
    for file, frames in zip(files, videos, strict=True):
        images.write(picture(frames[0]), file)
    return files
