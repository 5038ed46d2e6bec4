"""Pictures among a request's arguments: read before anything is queued, in a thread, and never too large.

A picture may be a PIL image, an array, a tensor, the bytes of an image file, or such a file: its path, or opened. What
is in a file or bytes is read as diffusers' ``load_image`` reads it. PIL images, tensors and arrays of floats pass as
they are; diffusers takes arrays to be scaled to 0..1, so arrays and tensors of bytes (0..255) become PIL images, and so
do masks of True and False, or of 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from anyio import to_thread

from steploom.errors import InvalidRequest
from steploom.requests import DiffusionRequest

_NAMES = re.compile(r"(^|_)(images?|masks?|video|frames?|sketch|depth_map)$|^image_(reference|\d)$")
_NOT_PICTURES = re.compile(r"attention_mask|embeds_mask|padding_mask|^(use|keep|num|add|max|base)_|_mask_\d$")
_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_LONGEST_PATH = 4096
_GIVE = "give a PIL image, an array, the bytes of an image file, or its path"


def is_picture_argument(name: str) -> bool:
    """Whether an argument of a pipeline takes pictures, by its name in diffusers."""
    return _NAMES.search(name) is not None and _NOT_PICTURES.search(name) is None


async def load_pictures(request: DiffusionRequest, max_pixels: int) -> DiffusionRequest:
    """``request`` with all its pictures read, in a thread; the same object if there is nothing to read.

    Args:
        request: As it was given.
        max_pixels: The largest picture that is read.

    Raises:
        InvalidRequest: A picture cannot be read, or is too large.
    """
    changes: dict[str, Any] = {}
    for name, value in request.params.items():
        if any(_reader(name, leaf) for leaf in _leaves(value)):
            changes[name] = await to_thread.run_sync(_read, name, value, max_pixels)
    return request.with_params(**changes) if changes else request


def check_pictures(request: DiffusionRequest, max_pixels: int) -> None:
    """Checks pictures that are read.

    Raises:
        InvalidRequest: One is no picture, too large, or has no pixels.
    """
    for name, value in request.params.items():
        if not is_picture_argument(name) or value is None:
            continue
        if isinstance(value, (list, tuple)) and not value:
            raise InvalidRequest(f"{name}={value!r}: is empty; {_GIVE}", field=name)
        for leaf in _leaves(value):
            if isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool):
                raise InvalidRequest(f"{name}={_brief(leaf)}: is no picture; {_GIVE}", field=name)
            if re.match(r"u?int(16|32|64)$|int8$", _kind(leaf)):
                raise InvalidRequest(
                    f"{name}: an array of {_kind(leaf)} is no picture; give uint8 (0 to 255) or floats (0 to 1)",
                    field=name,
                )
            size = _size(leaf)
            if size is not None:
                _check_size(name, size, max_pixels)


def _leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dicts hold; ``value`` itself if it is none."""
    if isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _leaves(item)
    else:
        yield value


def _read(name: str, value: Any, max_pixels: int) -> Any:
    """``value`` with the pictures in it read."""
    if type(value) in (list, tuple):
        return type(value)(_read(name, item, max_pixels) for item in cast("list[Any]", value))
    if type(value) is dict:
        return {key: _read(name, item, max_pixels) for key, item in cast("dict[Any, Any]", value).items()}
    reader = _reader(name, value)
    if reader is None:
        return value
    try:
        return reader(partial(_check_size, name, max_pixels=max_pixels))
    except InvalidRequest:
        raise
    except Exception as error:  # the request's boundary: files, and objects of the caller's, raise anything when read
        why = f"{type(error).__name__}: {error}"
        raise InvalidRequest(
            f"{name}: the image cannot be read ({_brief(value)}: {why:.300}); give one that is whole", field=name
        ) from error


Reader = Callable[[Callable[[tuple[int, int]], None]], Any]
"""Reads one picture, after it has told its width and height."""


def _reader(name: str, value: Any) -> Reader | None:
    """How to read ``value``; None if there is nothing to read."""
    if getattr(value, "tile", None) and hasattr(value, "load") and hasattr(value, "mode"):
        return partial(_loaded, value)  # Pillow opens a file lazily
    if not is_picture_argument(name):
        return None
    if isinstance(value, (str, Path)):
        return partial(_from_file, name, value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return partial(_from_bytes, value)
    if callable(getattr(value, "read", None)):
        return lambda check: _from_bytes(value.read(), check)
    if _kind(value) in ("uint8", "bool") and 2 <= value.ndim <= 4:
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
        raise InvalidRequest(f"{name}={_brief(given)}: is no path of a file; {mend} and give its bytes", field=name)
    path = Path(text[:_LONGEST_PATH]).expanduser()
    if len(text) > _LONGEST_PATH or not path.is_file():
        raise InvalidRequest(f"{name}={_brief(text)}: there is no such file; {_GIVE}", field=name)
    with path.open("rb") as file:
        return _decoded(file, check)


def _from_bytes(given: Any, check: Callable[[tuple[int, int]], None]) -> Any:
    import io

    return _decoded(io.BytesIO(given), check)


def _decoded(file: Any, check: Callable[[tuple[int, int]], None]) -> Any:
    """As diffusers' ``load_image``: turned upright, in RGB."""
    from PIL import Image, ImageOps

    with Image.open(file) as picture:
        check(picture.size)
        return ImageOps.exif_transpose(picture).convert("RGB")


def _kind(value: Any) -> str:
    """The name of an array's or tensor's dtype; empty for anything else."""
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def _from_array(given: Any, mask: bool, check: Callable[[tuple[int, int]], None]) -> Any:
    """An RGB image of ``[height, width]``, ``[height, width, channels]`` or a tensor ``[channels, height, width]``.

    Of more dimensions a list of them. What holds only 0 and 1 where a mask is wanted means black and white.
    """
    import numpy
    from PIL import Image

    array = given.detach().cpu().numpy() if hasattr(given, "detach") else given
    if array.dtype == bool or (mask and array.size and array.max() == 1):
        array = array.astype(numpy.uint8) * numpy.uint8(255)
    if array.ndim == 4:
        return [_from_array(one, False, check) for one in array]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        return given
    height, width = array.shape[:2]
    check((width, height))
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).convert("RGB")


def _size(picture: Any) -> tuple[int, int] | None:
    """Width and height of a PIL image, an array with at most 4 channels in its last dimension, or a tensor."""
    shape = getattr(picture, "shape", None)
    if shape is None:
        size = getattr(picture, "size", None)
        return cast("tuple[int, int]", size) if isinstance(size, tuple) and hasattr(picture, "mode") else None
    if len(shape) < 2:
        return None
    last = len(shape) > 2 and not hasattr(picture, "is_cuda") and shape[-1] <= 4
    height, width = shape[-3:-1] if last else shape[-2:]
    return int(width), int(height)


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{name}: {width}x{height} is more than {max_pixels} pixels (EngineConfig.max_pixels); make it smaller",
            field=name,
        )
    if width < 1 or height < 1:
        raise InvalidRequest(f"{name}: {width}x{height} has no pixels", field=name)


def _brief(value: Any) -> str:
    """What a message says of a value."""
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    return f"{value!r:.80}" if isinstance(value, (str, Path, int, float)) else f"<{type(value).__name__}>"
