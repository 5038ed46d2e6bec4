"""Files of pictures that clients send: which are opened at all, and how large they may become."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image

from steploom.server.errors import ApiError, invalid

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is opened, as Pillow names it. Its other formats are read by code that has seen few hostile files, and EPS by
running another program."""

TOGETHER = 4
"""The pictures of one request may have so many times the pixels of one."""

FAULTS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError)
"""What Pillow raises for files that are damaged, or made to hurt."""


def opened(data: bytes) -> Image.Image:
    """The picture in ``data``, of which no more than its head was read.

    Raises:
        Exception: One of ``FAULTS``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked by all callers
        return Image.open(io.BytesIO(data), formats=FORMATS)


def check_files(name: str, files: Sequence[bytes], max_pixels: int) -> None:
    """Checks pictures by their heads, before any is decoded; work for a thread.

    Raises:
        ApiError: 400: one is no picture, or too large, or all together are.
    """
    pixels = 0
    for data in files:
        try:
            with opened(data) as picture:
                size = picture.size
        except FAULTS as error:
            raise unreadable(name, error) from None
        check_size(name, size, max_pixels)
        pixels += size[0] * size[1]
    if pixels > TOGETHER * max_pixels:
        raise invalid(
            f"{name}: {len(files)} images have {pixels} pixels together, at most {TOGETHER * max_pixels}; "
            "make them smaller",
            name,
        )


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Refuses what is too large.

    Raises:
        ApiError: 400.
    """
    if size[0] * size[1] > max_pixels:
        raise invalid(f"{name}: {size[0]}x{size[1]} is more than {max_pixels} pixels; make it smaller", name)


def unreadable(name: str, error: BaseException) -> ApiError:
    """Says what one of ``FAULTS`` means."""
    known = "PNG, JPEG, WebP, GIF and BMP are read"
    why = "it is no image" if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
    return invalid(f"{name}: the image cannot be read ({why:.200}); {known}; give one that is whole", name)
