"""Image files, and animations in them, by Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steploom.errors import ConfigError
from steploom.media.whole import replaced

_MEND = "use .png, .jpg, .webp or .gif"


def knows(ending: str) -> bool:
    """Whether the ending is one of an image format."""
    from PIL import Image

    return ending.lower() in Image.registered_extensions()


def check(path: Path) -> None:
    """Saves a small image in memory: what Pillow can read, and even what it says that it can save, it often cannot.

    Raises:
        ConfigError: Images cannot be saved under this name.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: {path.suffix or 'no ending'!r} names no image format; {_MEND}")
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"{path}: images cannot be saved as {path.suffix!r}; {_MEND}") from None


def picture(frame: Any) -> Any:
    """A frame ``[height, width, 3]`` of uint8 as a PIL image."""
    from PIL import Image

    return Image.fromarray(frame)


def write(image: Any, path: Path) -> None:
    """Saves a PIL image; where the format has no transparency, without."""
    try:
        _save(image, path)
    except OSError as error:
        if error.errno or image.mode == "RGB":
            raise
        _save(image.convert("RGB"), path)  # as JPEG has no transparency


def _save(image: Any, path: Path, **options: Any) -> None:
    """As ``image.save``, which does not notice where a disk takes only the first part of what it writes at once."""
    from PIL import Image

    whole = io.BytesIO()
    image.save(whole, Image.registered_extensions()[path.suffix.lower()], **options)
    with replaced(path) as part:
        part.write_bytes(whole.getbuffer())


def animate(frames: Sequence[Any], path: Path, frame_rate: float) -> None:
    """Saves frames ``[height, width, 3]`` of uint8 as one animation that repeats.

    Raises:
        ConfigError: There is no frame.
    """
    if not frames:
        raise ConfigError(f"{path}: the pipeline made no image")
    first, *rest = map(picture, frames)
    if not rest:
        write(first, path)
        return
    _save(first, path, save_all=True, append_images=rest, duration=round(1000 / frame_rate), loop=0)
