"""The files that ``steploom generate`` leaves. Whether they can be written is found out before anything is made."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steploom import media
from steploom.errors import ConfigError, GenerationFailed

if TYPE_CHECKING:
    from PIL.Image import Image

    from steploom import DiffusionOutput

DEFAULT = Path("out.png")
"""Where images go if nobody says."""

_KEPT = {"images": ".png", "videos": ".webp", "audios": ".wav", "text": ".txt"}
"""What is written under whatever is installed."""

_FOLDER = "-o {}: is a folder; give a file in it, such as {}"

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A file, what is in it in words, and a picture of it (of a video its middle frame)."""

    file: Path
    what: str
    picture: Image | None = None


def check_file(path: Path) -> Path:
    """``path``, if its name is one for a file that we can write, in a folder that exists.

    Raises:
        ConfigError: The ending names no format, a package is missing, or the folder is not there.
    """
    if os.path.isdir(path):  # noqa: PTH112 - of a name that is too long pathlib raises
        raise ConfigError(_FOLDER.format(path, path / "out.png"))
    try:
        media.check(path)
    except ConfigError as error:
        raise ConfigError(f"-o {error}") from None
    if not path.parent.is_dir():
        raise ConfigError(f"-o {path}: the folder {str(path.parent)!r} does not exist; create it first")
    return path


def check_writable(path: Path) -> None:
    """Opens ``path`` for writing, and leaves everything as it was.

    Raises:
        ConfigError: That is not possible.
    """
    try:
        if path.is_dir():
            raise ConfigError(_FOLDER.format(path, path / "out.png"))
        if path.exists() and not path.is_file():
            raise ConfigError(f"-o {path}: is no regular file; choose another name")
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"-o {path}: cannot be written ({error.strerror}); choose another file or folder") from None


def expected(file: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """The files that one request will leave, if its output is as many as it asks for."""
    counts = [parameters.get(name) for name in _COUNTS]
    return media.numbered(file, next((count for count in counts if isinstance(count, int) and count > 0), 1))


def default_file(file: Path, makes: Sequence[str]) -> Path | None:
    """Where to put what a pipeline makes if nobody says; None prints it (text).

    Args:
        file: For an image.
        makes: Of :data:`steploom.media.KINDS`; nothing if that is not known.
    """
    if not makes or "images" in makes:
        return file
    if makes[0] == "videos":
        return file.with_suffix(".mp4" if importlib.util.find_spec("av") else ".webp")
    return file.with_suffix(".wav") if makes[0] == "audios" else None


def check_kind(file: Path, makes: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Refuses, before the work, a file that cannot hold what the pipeline makes.

    Raises:
        ConfigError: It cannot.
    """
    kinds = media.kinds_of(file)
    single = parameters.get("num_frames") == 1 and "videos" in makes and "images" in kinds
    if makes and not single and not set(kinds) & set(makes):
        raise ConfigError(f"-o {file}: this pipeline makes {makes[0]}; use {media.endings_for(makes[0])}")


def write(output: DiffusionOutput, file: Path, frame_rate: float | None = None) -> list[Saved]:
    """Saves an output, numbered if there are several.

    Raises:
        GenerationFailed: The file's format cannot hold what the pipeline made; then it is kept in one that can.
    """
    try:
        return _described(output, output.save(file, frame_rate=frame_rate))
    except ConfigError as error:
        raise GenerationFailed(f"-o {error}{_kept(output, file, frame_rate)}") from None


def _kept(output: DiffusionOutput, file: Path, frame_rate: float | None) -> str:
    for kind, ending in _KEPT.items():
        if output.has(kind) and file.suffix.lower() != ending:
            try:
                files = output.save(file.with_suffix(ending), frame_rate=frame_rate)
            except ConfigError:
                return ""
            return f" (this time they were kept as {', '.join(map(str, files))})"
    return ""


def _described(output: DiffusionOutput, files: Sequence[Path]) -> list[Saved]:
    kinds = media.kinds_of(files[0])
    if output.has("videos") and set(kinds) & {"videos", "images"}:
        return [_video(file, frames) for file, frames in zip(files, media.frames_of(output.videos), strict=True)]
    if "images" in kinds and output.has("images"):
        pictures = media.pictures_of(output.images)
        return [Saved(f, f"{p.width}x{p.height}", p) for f, p in zip(files, pictures, strict=True)]
    if "audios" in kinds:
        rate = output.sampling_rate or 1
        waves = media.waves_of(output.audios)
        return [Saved(f, f"{wave.shape[-1] / rate:.1f} s at {rate} Hz") for f, wave in zip(files, waves, strict=True)]
    return [Saved(file, f"{len(file.read_text(encoding='utf-8')) - 1} characters") for file in files]


def _video(file: Path, frames: Sequence[Any]) -> Saved:
    height, width = frames[0].shape[:2]
    count = f", {len(frames)} frames" if len(frames) > 1 else ""
    return Saved(file, f"{width}x{height}{count}", media.picture(frames[len(frames) // 2]))
