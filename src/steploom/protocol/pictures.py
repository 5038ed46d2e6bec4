"""Which arguments of a pipeline take pictures: images, masks, videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from steploom.protocol import Parameter, PipelineInfo

PICTURE = "picture"
"""What :attr:`~steploom.protocol.Parameter.kind` is where annotations say that nothing else is taken."""

FRAMES = ("num_frames", "video_length", "frames")
"""Arguments that say how long a video is."""
WINDOWS = ("segment_frame_length", "num_frames_per_chunk")
"""Arguments that say how many frames of a video are made at once."""
LATENT_WINDOWS = ("latent_window_size", "num_latent_frames_per_chunk")
"""Arguments that say so in frames of its latents."""

_NAMES = re.compile(r"(^|_)(images?|masks?|video|frames?|sketch|depth_map)$|^image_(reference|\d)$")
_NOT_PICTURES = re.compile(r"attention_mask|embeds_mask|padding_mask|^(use|keep|num|add|max|base|atom37)_|_mask_\d$")
_CONDITIONS = re.compile(r"(^|_)conditions$")
_OF_CONDITION = ("image", "video", "frames")
"""Fields of the objects that such arguments list (diffusers' ``LTXVideoCondition``)."""
_FRAMES = re.compile(r"video|frames")


@lru_cache(maxsize=1024)  # each request asks for all arguments of its pipeline, several times
def named_as_picture(name: str) -> bool:
    """Whether an argument takes pictures by its name in diffusers, as far as that tells."""
    return _NAMES.search(name) is not None and _NOT_PICTURES.search(name) is None


def takes_pictures(parameter: Parameter) -> bool:
    """Whether a parameter takes pictures, by its name and its annotation: ``frames`` may be a number."""
    return parameter.kind in (PICTURE, "") and named_as_picture(parameter.name)


def is_video(name: str) -> bool:
    """Whether a list of pictures as the argument ``name`` is the frames of a video."""
    return _FRAMES.search(name) is not None


def pictures_among(params: Mapping[str, Any], info: PipelineInfo) -> dict[str, Any]:
    """Those of a request's arguments that are to be pictures, if they are given at all.

    A pipeline that makes nothing but sound takes none: what it calls a mask is of its latents.
    """
    if info.makes == ["audios"]:
        return {}
    found = {name: value for name, value in params.items() if value is not None and named_as_picture(name)}
    for parameter in info.parameters if found else ():
        if not takes_pictures(parameter):
            found.pop(parameter.name, None)
    return found


def pictures_of_conditions(params: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The pictures that stand in objects of diffusers', frame by frame or whole videos, by argument."""
    found: dict[str, list[Any]] = {}
    for name, value in params.items():
        if _CONDITIONS.search(name) and value is not None:
            listed = cast("list[Any]", value) if isinstance(value, (list, tuple)) else [value]
            fields = (getattr(one, field, None) for one in listed for field in _OF_CONDITION)
            found[name] = [field for field in fields if field is not None]
    return found
