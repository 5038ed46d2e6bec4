"""How large the images of a request will be, as far as its arguments say; the bound is ``EngineConfig.max_pixels``.

What only the pipeline knows (the size that it chooses for a picture) the worker checks when the pipeline says it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from steploom.config import EngineConfig
from steploom.errors import InvalidRequest
from steploom.media.pictures import is_tensor, leaves, shape_of, size_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import pictures_among
from steploom.requests import DiffusionRequest

_SIDES = ("processing_resolution", "output_resolution", "resolution", "frame_size")
"""Arguments that say how long a side is, more or less."""
_UPSAMPLED = ("upsampling_width", "upsampling_height")
_COLOURS = (1, 3)
_NOT_MADE_OF = re.compile(r"mask|ip_adapter|reference")
"""Pictures that have no say in the size of what is made."""


class Area(NamedTuple):
    """Pixels of one image, and the argument that they come of."""

    field: str
    said: str
    pixels: float


def check_areas(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Refuses larger images than ``config`` allows, before any picture is read.

    Raises:
        InvalidRequest: Names the argument, its value and the limit.
    """
    _refuse(_said(request, info), config)


def check_made_of_pictures(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Refuses pictures of which larger images would be made than ``config`` allows.

    Raises:
        InvalidRequest: Names the picture, its size and the limit.
    """
    _refuse(_made(request, info), config)


def _refuse(areas: Iterator[Area], config: EngineConfig) -> None:
    for area in areas:
        if area.pixels > config.max_pixels:
            raise InvalidRequest(
                f"{area.said}: at most {config.max_pixels} pixels (EngineConfig.max_pixels)", field=area.field
            )


def _said(request: DiffusionRequest, info: PipelineInfo) -> Iterator[Area]:
    params = request.params
    asked = params.get("width"), params.get("height")
    follows = info.follows_pictures and not any(asked) and pictures_among(params, info)
    default = (info.default_size or (1, 1)) if not follows else (1, 1)
    width, height = asked[0] or default[0], asked[1] or default[1]
    larger = [params.get(name) or 1 for name in _UPSAMPLED]
    yield Area(_UPSAMPLED[0], ", ".join(map("{}={}".format, _UPSAMPLED, larger)), math.prod(larger))
    times = info.enlarges
    more = "" if times == 1 else f", of which {info.pipeline_class} makes {times * width:g}x{times * height:g}"
    yield Area("width", f"width={width}, height={height}{more}", width * height * times**2)
    for name in _SIDES:
        if _is_count(params.get(name)):
            yield Area(name, f"{name}={params[name]}", params[name] ** 2)
    if _is_count(params.get("max_area")):
        yield Area("max_area", f"max_area={params['max_area']}", params["max_area"])
    yield from _of_latents(params, info)


def _of_latents(params: Mapping[str, Any], info: PipelineInfo) -> Iterator[Area]:
    """Images of latents that are given: ``[rows, channels, height, width]``, and frames where the pipeline has them."""
    shape = shape_of(params.get("latents"))
    if shape is not None and len(shape) in (4, 5) and info.pixels_per_latent:
        sides = info.latent_axes[1:] if len(shape) == 5 else (-2, -1)
        height, width = (shape[axis] * info.pixels_per_latent for axis in sides)
        yield Area("latents", f"latents of {list(shape)}, which make {width}x{height}", width * height)


def _made(request: DiffusionRequest, info: PipelineInfo) -> Iterator[Area]:
    times = request.params.get("resolution_scale", info.enlarges)
    pictures = pictures_among(request.params, info) if info.follows_pictures else {}
    for name, value in pictures.items():
        for leaf in leaves(name, value) if not _NOT_MADE_OF.search(name) else ():
            size, shape = size_of(leaf), shape_of(leaf) or ()
            if size is None or not isinstance(times, (int, float)):
                continue
            factor = times
            if is_tensor(leaf) and len(shape) > 2 and shape[-3] not in _COLOURS and info.pixels_per_latent:
                factor *= info.pixels_per_latent  # diffusers takes it for latents
            if factor != 1:
                width, height = (math.floor(side * factor) for side in size)
                said = f"{name}: {info.pipeline_class} makes {width}x{height} of {size[0]}x{size[1]}"
                yield Area(name, said, width * height)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
