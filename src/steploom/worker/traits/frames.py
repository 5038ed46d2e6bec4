"""How many frames a pipeline can make. Most round what they are asked for; told is what they fail at."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from steploom.weave import signatures, source_code
from steploom.worker.traits import products

_LEAST: Mapping[str, int] = {
    "AllegroPipeline": 5, "Kandinsky5I2VPipeline": 4, "StableVideoDiffusionPipeline": 2,
}  # fmt: skip
"""Of pipelines that fail at the single frame that is left of fewer."""

_STRICT = ("CosmosVideoToWorldPipeline",)
"""Pipelines that count the frames of the video that they are given otherwise than those of their latents."""


def told(pipeline: Any, denoiser: Any) -> dict[str, Any]:
    """What :class:`~steploom.protocol.PipelineInfo` says of the frames of a video, by field."""
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    return {
        "frame_multiple": products.frame_multiple(pipeline),
        "frames_strict": any(name in _STRICT for name in names),
        "frames_least": next((_LEAST[name] for name in names if name in _LEAST), 1),
        "frames_most": most(pipeline, denoiser),
        "frames_only": only(pipeline, denoiser),
        "latent_axes": latent_axes(pipeline),
    }


def most(pipeline: Any, denoiser: Any) -> int | None:
    """The most frames for which the denoiser has learned positions (AnimateDiff, Cosmos), if it sets a bound."""
    config: Any = getattr(denoiser, "config", None)
    positions = getattr(config, "motion_max_seq_length", None)
    if isinstance(positions, int):
        return None if getattr(pipeline, "free_noise_enabled", False) else positions  # then a window of them
    sizes = getattr(config, "max_size", None)
    if getattr(config, "extra_pos_embed_type", None) != "learnable" or not isinstance(sizes, Sequence):
        return None
    return cast("Sequence[int]", sizes)[0] * products.frame_multiple(pipeline)


def only(pipeline: Any, denoiser: Any) -> int | None:
    """The one number of frames, besides one, for which the denoiser has learned positions (Latte), if so."""
    length = getattr(getattr(denoiser, "config", None), "video_length", None)
    return length if isinstance(length, int) and "video_length" in signatures.call_parameters(pipeline) else None


def latent_axes(pipeline: Any) -> tuple[int, int, int]:
    """Where frames, height and width are in the shape of the latents that it prepares; mostly at the end."""
    body = source_code.function(pipeline, "prepare_latents")
    for targets, value, _ in source_code.assignments(body) if body is not None else ():
        if targets != {"shape"} or not isinstance(value, ast.Tuple) or len(value.elts) != 5:
            continue
        said = [" ".join(source_code.names(element)) for element in value.elts]
        parts = ("frames|video_length", "height", "width")
        found = [axis for part in parts for axis, one in enumerate(said) if re.search(part, one)]
        if len(found) == len(parts):
            return found[0], found[1], found[2]
    return 2, 3, 4
