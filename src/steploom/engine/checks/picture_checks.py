"""What cannot be a picture, whatever the pipeline: refused before anything is queued.

What only some pipelines take (several pictures, arrays, a palette) is theirs to refuse, and told by
:mod:`steploom.worker.blame.picture_faults`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from steploom.errors import InvalidRequest
from steploom.media.pictures import brief, is_image, kind_of, leaves, shape_of, size_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import PICTURE, pictures_among, pictures_of_conditions
from steploom.requests import DiffusionRequest

A_PICTURE = "a PIL image, an array, the bytes of an image file, or its path"
"""What may be given wherever a picture is wanted."""

GIVE = f"give {A_PICTURE}"

_DIMENSIONS = range(2, 6)
"""Of an array: from ``[height, width]`` to a batch of videos."""

_NUMBERS = re.compile(r"u?int(16|32|64)$|int8$")
_FLOATS = re.compile(r"b?float(16|32|64)$")
_TAKEN = re.compile(r"b?float\d*(_\w+)?$|uint8$|bool$")


def check_pictures(request: DiffusionRequest, info: PipelineInfo, max_pixels: int) -> None:
    """Checks pictures that are read.

    Raises:
        InvalidRequest: One is no picture, too large, or has no pixels.
    """
    only = {parameter.name for parameter in info.parameters if parameter.kind == PICTURE}
    for name, value in pictures_among(request.params, info).items():
        if name in only and isinstance(value, dict):
            raise InvalidRequest(f"{name}={brief(value)}: is no picture; {GIVE}", field=name)
        found = list(leaves(name, value))
        if not found:
            raise InvalidRequest(f"{name}={value!r:.80}: is empty; {GIVE}", field=name)
        for leaf in found:
            _check(name, leaf, max_pixels, sure=name in only)
    for name, value in pictures_of_conditions(request.params).items():
        for leaf in leaves(name, value):
            if (size := size_of(leaf)) is not None:
                check_size(name, size, max_pixels)


def _check(name: str, leaf: Any, max_pixels: int, *, sure: bool) -> None:
    """Checks one picture; ``sure`` if the pipeline takes nothing else as this argument."""
    shape = shape_of(leaf)
    if shape is not None:
        _check_array(name, leaf, shape, sure=sure)
    elif _is_number(leaf) or (sure and leaf is not None and not is_image(leaf)):
        raise InvalidRequest(f"{name}={brief(leaf)}: is no picture; {GIVE}", field=name)
    size = size_of(leaf)
    if size is not None:
        check_size(name, size, max_pixels)


def _check_array(name: str, leaf: Any, shape: tuple[int, ...], *, sure: bool) -> None:
    kind = kind_of(leaf)
    passes_on = _NUMBERS.match(kind) and to_encoder(name)  # which scales by the dtype
    if not _TAKEN.match(kind) and not passes_on:
        raise InvalidRequest(
            f"{name}: an array of {kind:.40} is no picture; give uint8 (0 to 255) or floats (0 to 1)", field=name
        )
    if sure and len(shape) not in _DIMENSIONS:
        raise InvalidRequest(
            f"{name}={brief(leaf)}: is {len(shape)}-dimensional; give [height, width, channels], a tensor "
            "[channels, height, width], or a batch of them",
            field=name,
        )
    if 0 in shape:
        raise InvalidRequest(f"{name}={brief(leaf)}: has no pixels; {GIVE}", field=name)
    if _is_hollow(leaf):
        raise InvalidRequest(f"{name}={brief(leaf)}: holds no pixels to read; give a dense tensor", field=name)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def _is_hollow(leaf: Any) -> bool:
    return bool(getattr(leaf, "is_meta", False) or getattr(leaf, "is_sparse", False))


def check_finite(name: str, value: Any) -> None:
    """Refuses arrays and tensors that hold NaN or infinity, of which only such images come. Work for a thread.

    Raises:
        InvalidRequest: One does.
    """
    for leaf in leaves(name, value):
        shape = shape_of(leaf)
        if not shape or 0 in shape or not _FLOATS.match(kind_of(leaf)) or _is_hollow(leaf):
            continue
        plain = leaf.detach() if hasattr(leaf, "detach") else leaf
        ends = float(plain.min()), float(plain.max())  # both are NaN if anything is
        if not all(map(math.isfinite, ends)):
            raise InvalidRequest(
                f"{name}={brief(leaf)}: its values go from {ends[0]} to {ends[1]}; give finite ones", field=name
            )


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Refuses a picture of that width and height if it is too large, or nothing.

    Raises:
        InvalidRequest: It is.
    """
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{name}: {width}x{height} is more than {max_pixels} pixels (EngineConfig.max_pixels); make it smaller",
            field=name,
        )
    if width < 1 or height < 1:
        raise InvalidRequest(f"{name}: {width}x{height} has no pixels; {GIVE}", field=name)


def to_encoder(name: str) -> bool:
    """Whether pictures go to an image encoder alone, whose preprocessing knows arrays of bytes and of batches."""
    return "ip_adapter" in name
