"""Pictures among a request's arguments: read before anything is queued, in a thread, and never too large.

A picture may be a PIL image, an array, a tensor, the bytes of an image file, or such a file: its path, or opened. What
is in a file or bytes is read as diffusers' ``load_image`` reads it. PIL images, tensors and arrays of floats pass as
they are; diffusers takes arrays to be scaled to 0..1, so arrays and tensors of bytes (0..255) become PIL images, and so
do masks of True and False, or of 0 and 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from steploom.config import expanded
from steploom.engine.checks.picture_checks import GIVE, check_finite, check_size, to_encoder
from steploom.errors import ConfigError, InvalidRequest
from steploom.media.pictures import brief, kind_of, leaves, lost_in_8_bits, shape_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import is_video, pictures_among
from steploom.requests import DiffusionRequest
from steploom.threads import PICTURES

_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_LONGEST_PATH = 4096
_LITTLE = 1 << 20
"""Numbers that are looked through in half a millisecond."""


async def load_pictures(request: DiffusionRequest, info: PipelineInfo, max_pixels: int) -> DiffusionRequest:
    """``request`` with all its pictures read, in a thread; the same object if there is nothing to read.

    Args:
        request: As it was given.
        info: The pipeline that it is for.
        max_pixels: The largest picture that is read.

    Raises:
        InvalidRequest: A picture cannot be read, is too large, or holds what is no number.
    """
    pictures = pictures_among(request.params, info)
    tensors = {parameter.name for parameter in info.parameters if parameter.kind == "tensor"}
    changes: dict[str, Any] = {}
    doubtful: dict[str, Any] = {}
    for name, value in request.params.items():
        found = list(leaves(name, value))
        if any(_reader(name, leaf, pictures) for leaf in found):
            changes[name] = await PICTURES.run(_read, name, value, pictures, max_pixels)
        if (name in pictures or name in tensors) and any(map(shape_of, found)):
            doubtful[name] = value
    if _is_little(doubtful):
        _check_all_finite(doubtful)
    else:
        await PICTURES.run(_check_all_finite, doubtful)
    return request.with_params(**changes) if changes else request


def _is_little(values: Mapping[str, Any]) -> bool:
    """Whether it is sooner looked at than handed to a thread; who waits for one may miss a tick."""
    found = [leaf for name, value in values.items() for leaf in leaves(name, value)]
    on_device = any(getattr(leaf, "is_cuda", False) for leaf in found)  # to look at it waits for what the device does
    return not on_device and sum(math.prod(shape_of(leaf) or (0,)) for leaf in found) <= _LITTLE


def _check_all_finite(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        check_finite(name, value)


def _read(name: str, value: Any, pictures: Mapping[str, Any], max_pixels: int) -> Any:
    """``value`` with the pictures in it read."""
    if type(value) in (list, tuple):
        return type(value)(_read(name, item, pictures, max_pixels) for item in cast("list[Any]", value))
    if type(value) is dict:
        items = cast("dict[Any, Any]", value).items()
        return {key: _read(name, item, pictures, max_pixels) for key, item in items}
    reader = _reader(name, value, pictures)
    if reader is None:
        return value
    try:
        return reader(partial(check_size, name, max_pixels=max_pixels))
    except InvalidRequest:
        raise
    except Exception as error:  # the request's boundary: files, and objects of the caller's, raise anything when read
        raise InvalidRequest(
            f"{name}: the image cannot be read ({brief(value)}: {_why(error):.300}); give one that is whole", field=name
        ) from error


def _why(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # whose own words are of the file object that we made
        return "it is no file of an image; SVG has to be drawn first, and a video taken apart into frames"
    return f"{type(error).__name__}: {error}"


Reader = Callable[[Callable[[tuple[int, int]], None]], Any]
"""Reads one picture, after it has told its width and height."""


def _reader(name: str, value: Any, pictures: Mapping[str, Any]) -> Reader | None:
    """How to read ``value``; None if there is nothing to read."""
    if getattr(value, "tile", None) and hasattr(value, "load") and hasattr(value, "mode"):
        return partial(_loaded, value)  # Pillow opens a file lazily
    if name not in pictures:
        return None
    if isinstance(value, (str, Path)):
        return partial(_from_file, name, value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return partial(_from_bytes, name, value)
    if callable(getattr(value, "read", None)):
        return lambda check: _from_bytes(name, value.read(), check)
    shape = shape_of(value) or ()
    if kind_of(value) in ("uint8", "bool") and 2 <= len(shape) <= 5 and 0 not in shape and not to_encoder(name):
        return partial(_from_array, value, "mask" in name)
    return None


def _loaded(picture: Any, check: Callable[[tuple[int, int]], None]) -> Any:
    check(picture.size)
    picture.load()
    return picture


def _from_file(name: str, given: str | Path, check: Callable[[tuple[int, int]], None]) -> Any:
    text = str(given)
    address = _ADDRESS.match(text)
    if isinstance(given, str) and address is not None and len(address[1]) > 1:
        mend = "fetch it yourself" if address[1] != "data" else "decode it yourself"
        raise InvalidRequest(f"{name}={brief(given)}: is no path of a file; {mend} and give its bytes", field=name)
    if not text:
        raise InvalidRequest(f"{name}='': is empty; {GIVE}", field=name)
    try:
        path = expanded(text[:_LONGEST_PATH], name)
    except ConfigError as error:
        raise InvalidRequest(str(error), field=name) from None
    if len(text) <= _LONGEST_PATH and path.is_dir():
        raise InvalidRequest(f"{name}={brief(text)}: is a folder; give the path of one file, or a list", field=name)
    if len(text) > _LONGEST_PATH or not path.is_file():
        raise InvalidRequest(f"{name}={brief(text)}: there is no such file; {GIVE}", field=name)
    with path.open("rb") as file:
        return _decoded(name, file, check)


def _from_bytes(name: str, given: Any, check: Callable[[tuple[int, int]], None]) -> Any:
    import io

    if not len(given):
        raise InvalidRequest(f"{name}={brief(given)}: is empty; {GIVE}", field=name)
    return _decoded(name, io.BytesIO(given), check)


def _decoded(name: str, file: Any, check: Callable[[tuple[int, int]], None]) -> Any:
    """As diffusers' ``load_image``: turned upright, in RGB."""
    from PIL import Image, ImageOps

    with Image.open(file) as picture:
        check(picture.size)
        frames = getattr(picture, "n_frames", 1)
        if is_video(name) and frames > 1:  # of which load_image takes the first
            raise InvalidRequest(f"{name}: an animation of {frames} frames; give them as a list", field=name)
        mend = lost_in_8_bits(picture, mask="mask" in name)
        if mend is not None:
            raise InvalidRequest(
                f"{name}: an image of mode {picture.mode}, whose values load_image would cut off at 255; give 8 bits: "
                f"{mend}",
                field=name,
            )
        return ImageOps.exif_transpose(picture).convert("RGB")


def _from_array(given: Any, mask: bool, check: Callable[[tuple[int, int]], None]) -> Any:
    """An RGB image of ``[height, width]``, ``[height, width, channels]`` or a tensor ``[channels, height, width]``.

    Of more dimensions a list of them. What holds only 0 and 1 where a mask is wanted means black and white.
    """
    import numpy
    from PIL import Image

    array = given.detach().cpu().numpy() if hasattr(given, "detach") else given
    if array.dtype == bool or (mask and array.size and array.max() == 1):
        array = array.astype(numpy.uint8) * numpy.uint8(255)
    if array.ndim > 3:
        return [_from_array(one, False, check) for one in array]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        return given
    height, width = array.shape[:2]
    check((width, height))
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).convert("RGB")
