"""Image files: whether they can be written, which is found out before anything is generated, and writing them."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from steploom.errors import ConfigError, GenerationFailed

if TYPE_CHECKING:
    from PIL.Image import Image

    from steploom import DiffusionOutput

ANIMATED = (".gif", ".webp")
"""Endings of files that hold several frames."""


def check_image_file(path: pathlib.Path) -> pathlib.Path:
    """``path``, if its name is one for an image, in a folder that exists.

    Raises:
        ConfigError: The ending names no format that images can be saved in, or the folder is not there.
    """
    _check_format(path)
    if not path.parent.is_dir():
        raise ConfigError(f"-o {path}: the folder {str(path.parent)!r} does not exist; create it first")
    return path


def _check_format(path: pathlib.Path) -> None:
    """Saves a small image in memory: what Pillow can read, and even what it says that it can save, it often cannot."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    mend = "use .png, .jpg, .webp or .gif"
    if kind is None:
        raise ConfigError(f"-o {path}: {path.suffix or 'no ending'!r} names no image format; {mend}")
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"-o {path}: images cannot be saved as {path.suffix!r}; {mend}") from None


def check_writable(path: pathlib.Path) -> None:
    """Opens ``path`` for writing, and leaves everything as it was.

    Raises:
        ConfigError: That is not possible.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"-o {path}: is a folder; give a file in it, such as {path / 'out.png'}")
        if path.exists() and not path.is_file():
            raise ConfigError(f"-o {path}: is no regular file; choose another name")
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"-o {path}: cannot be written ({error.strerror}); choose another file or folder") from None


def numbered(file: pathlib.Path, count: int) -> list[pathlib.Path]:
    """``file`` if there is one, else ``file-1``, ``file-2`` and so on."""
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{place}") for place in range(1, count + 1)]


def write(output: DiffusionOutput, file: pathlib.Path) -> list[tuple[pathlib.Path, Image]]:
    """Saves an output's images, or its frames as animations, numbered if there are several.

    Returns:
        Each file, and its image (the last frame of an animation).

    Raises:
        GenerationFailed: The pipeline returned neither, or frames that the file's format cannot hold.
    """
    videos = getattr(output.output, "frames", None)
    if videos is None:
        pictures = [[image] for image in _flat(_images(output))]
    else:
        pictures = [list(_flat(frames)) for frames in videos]
    if not pictures or not all(pictures):
        raise GenerationFailed(f"-o {file}: the pipeline made no image")
    longest = max(len(frames) for frames in pictures)
    if longest > 1 and file.suffix.lower() not in ANIMATED:
        kept = ", ".join(str(target) for target, _ in _save_all(pictures, file.with_suffix(".webp")))
        raise GenerationFailed(
            f"-o {file}: the pipeline made {longest} frames; use .gif or .webp (this time they were kept as {kept})"
        )
    return _save_all(pictures, file)


def _images(output: DiffusionOutput) -> Any:
    try:
        return output.images
    except AttributeError as error:
        raise GenerationFailed(
            f"the pipeline made no images ({error}); `steploom generate` writes images and animations, use the engine "
            "from Python for anything else"
        ) from None


def _flat(value: object) -> Iterator[Image]:
    """The images in lists of lists of them."""
    from PIL import Image

    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in cast("Sequence[object]", value):
            yield from _flat(part)
    else:
        raise GenerationFailed(f"the pipeline made {type(value).__name__} where an image was expected")


def _save_all(pictures: Sequence[Sequence[Image]], file: pathlib.Path) -> list[tuple[pathlib.Path, Image]]:
    files = numbered(file, len(pictures))
    for target, (first, *rest) in zip(files, pictures, strict=True):
        if rest:
            first.save(target, save_all=True, append_images=rest, duration=60, loop=0)
        else:
            _save(first, target)
    return [(target, frames[-1]) for target, frames in zip(files, pictures, strict=True)]


def _save(image: Image, file: pathlib.Path) -> None:
    try:
        image.save(file)
    except OSError:
        if image.mode == "RGB":
            raise
        image.convert("RGB").save(file)  # as JPEG has no transparency
