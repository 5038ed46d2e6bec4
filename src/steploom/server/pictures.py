"""Pictures on their way in and out; all of it is work for a thread."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from steploom.server import picture_files
from steploom.server.errors import invalid
from steploom.server.fields import ImageFields
from steploom.threads import SERVING

_QUALITY = 100
"""Of OpenAI, where ``output_compression`` is not given."""


_SMALL = 256 * 256
"""Pixels up to which a PNG is made as fast as a JPEG, and looks better."""


async def encode(
    picture: Image.Image,
    fields: ImageFields,
    size: tuple[int, int] | None = None,
    notes: Mapping[str, str] | None = None,
) -> bytes:
    """``picture`` as a file of the format that was asked for, in a thread; brought to ``size`` if that is given.

    ``notes`` are texts by keyword that a PNG carries.
    """
    return await SERVING.run(_encode, picture, fields.output_format, fields.output_compression, size, notes)


async def encode_small(picture: Image.Image) -> tuple[bytes, str]:
    """``picture`` as a file that is quickly made, and its format; in a thread."""
    kind = "png" if picture.width * picture.height <= _SMALL else "jpeg"
    return await SERVING.run(_encode, picture, kind, None, None, None), kind


def _encode(
    picture: Image.Image,
    kind: str,
    compression: int | None,
    size: tuple[int, int] | None,
    notes: Mapping[str, str] | None,
) -> bytes:
    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if kind == "png" else {"quality": _QUALITY if compression is None else compression}
    if notes and kind == "png":
        options["pnginfo"] = info = PngInfo()
        for keyword, text in notes.items():
            info.add_itxt(keyword, text)
    picture.convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    """``data`` in base64."""
    return base64.b64encode(data).decode("ascii")


async def mask_of(data: bytes, max_pixels: int, image: bytes | None = None) -> Image.Image:
    """A mask as diffusers takes it, white where to paint, of one as OpenAI has it: transparent where to paint.

    A picture without transparency is taken as it is: white where to paint.

    Raises:
        ApiError: 400: it cannot be read, is too large, or not as large as ``image``.
    """
    return await SERVING.run(_mask, data, max_pixels, image)


def _mask(data: bytes, max_pixels: int, image: bytes | None) -> Image.Image:
    try:
        with picture_files.opened(data) as file:
            picture_files.check_size("mask", file.size, max_pixels)
            picture = ImageOps.exif_transpose(file)
            see_through = picture.has_transparency_data
            channel = picture.convert("RGBA").getchannel("A") if see_through else picture.convert("L")
    except picture_files.FAULTS as error:
        raise picture_files.unreadable("mask", error) from None
    size = size_of(image) if image is not None else None
    if size is not None and size != channel.size:
        raise invalid(
            f"mask: {channel.width}x{channel.height}, but image is {size[0]}x{size[1]}; make them equal", "mask"
        )
    return channel.point(_OPAQUE_TO_BLACK) if see_through else channel


_OPAQUE_TO_BLACK = [255, *[0] * 255]
"""Only what is fully transparent is painted."""


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of a picture as it is looked at; None of one that cannot be read. Work for a thread."""
    try:
        with picture_files.opened(data) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (picture.height, picture.width) if turned else picture.size
    except picture_files.FAULTS:
        return None  # the engine says what is wrong with it
