"""Which sizes a pipeline takes, found out by asking it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from steploom.errors import InvalidRequest
from steploom.media.pictures import brief
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import pictures_among
from steploom.requests import DiffusionRequest
from steploom.weave import signatures, untyped

log = logging.getLogger(__name__)

_LARGEST = 512
_REFUSED = re.compile(r"divisible|multiple", re.IGNORECASE)
_DECODED_LARGER = ("StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline")
"""Upscalers whose latents are as large as the picture, so that their VAE makes more of it."""
_ENLARGING = {"StableDiffusionLatentUpscalePipeline": 2.0, "LTXLatentUpsamplePipeline": 2.0,
              "LTX2LatentUpsamplePipeline": 2.0}  # fmt: skip
_USUAL: Mapping[str, Any] = {"prompt": "a", "strength": 0.5, "num_inference_steps": 2, "num_frames": 9}


def multiple(pipeline: Any) -> int:
    """What ``width`` and ``height`` must be multiples of, by the pipeline's own ``check_inputs``; 1 if it refuses none.

    Some pipelines round a size, others refuse it, by a number that hangs on VAE and patch size. So the pipeline is
    asked, with the smallest sizes first.
    """
    check = getattr(pipeline, "check_inputs", None)
    names = inspect.signature(check).parameters if callable(check) else {}
    if check is None or not {"height", "width"} <= names.keys():
        return 1
    call = signatures.call_parameters(pipeline)
    arguments: dict[str, Any] = {}
    for name, parameter in names.items():
        default = call[name].default if name in call else parameter.default
        arguments[name] = _USUAL.get(name, None if default is inspect.Parameter.empty else default)
    with untyped.quietly():
        accepted = (size for size in range(1, _LARGEST + 1) if not _refuses(check, arguments, size))
        return next(accepted, 1)


def _refuses(check: Any, arguments: dict[str, Any], size: int) -> bool:
    try:
        check(**{**arguments, "height": size, "width": size})
    except ValueError as error:
        return _REFUSED.search(str(error)) is not None
    except Exception as fault:  # noqa: BLE001 - it goes on to the other arguments, most of which are missing here
        log.debug("check_inputs with %d pixels came as far as %s: %s", size, type(fault).__name__, fault)
    return False


def most(pipeline: Any, denoiser: Any) -> int | None:
    """The largest width or height for which the denoiser has learned positions (SD 3), if it sets a bound."""
    embedding = getattr(denoiser, "pos_embed", None)
    patches, patch = getattr(embedding, "pos_embed_max_size", None), getattr(embedding, "patch_size", None)
    factor = getattr(pipeline, "vae_scale_factor", None)
    if isinstance(patches, int) and isinstance(patch, int) and isinstance(factor, int):
        return patches * patch * factor
    return None


def bound(request: DiffusionRequest, info: PipelineInfo, most_pixels: int) -> Callable[[int, int], None]:
    """Refuses the width and height that a pipeline says that its images will have, if that is too large.

    Some choose a size for a picture, or bring what they are given to an area of their own. The function that is
    returned raises InvalidRequest.
    """

    def check(width: int, height: int) -> None:
        if width * height <= most_pixels:
            return
        given = {name: request.params[name] for name in ("width", "height") if request.params.get(name)}
        said = given or pictures_among(request.params, info) or {"width": None, "height": None}
        raise InvalidRequest(
            f"{', '.join(f'{name}={brief(value)}' for name, value in said.items())}: {info.pipeline_class} makes "
            f"{width}x{height} of it, at most {most_pixels} pixels (EngineConfig.max_pixels)",
            field=next(iter(said)),
        )

    return check


def follows_pictures(pipeline: Any) -> bool:
    """Whether what is made of a picture may have the picture's size, where none is given."""
    parameters = signatures.call_parameters(pipeline)
    return not any(name in parameters and isinstance(parameters[name].default, int) for name in ("width", "height"))


def enlarges(pipeline: Any) -> float:
    """How many times wider and higher its images are than ``width`` and ``height``, or the picture, say."""
    scale = signatures.call_parameters(pipeline).get("resolution_scale")
    if scale is not None and isinstance(scale.default, (int, float)):
        return float(scale.default)
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    if any(name in _DECODED_LARGER for name in names):
        decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        levels = getattr(getattr(decoder, "config", None), "block_out_channels", (1,))
        return float(2 ** (len(levels) - 1))
    return next((_ENLARGING[name] for name in names if name in _ENLARGING), 1.0)


def pixels_per_latent(pipeline: Any) -> int:
    """Pixels along a side for each latent; 0 where that is not known."""
    found = (getattr(pipeline, name, None) for name in ("vae_scale_factor_spatial", "vae_scale_factor"))
    return next((value for value in found if isinstance(value, int)), 0)


def default(pipeline: Any, denoiser: Any) -> tuple[int, int] | None:
    """``(width, height)`` of what is made when no size is given, if that is known."""
    parameters = signatures.call_parameters(pipeline)
    if not {"width", "height"} <= parameters.keys():
        return None
    fixed = parameters["width"].default, parameters["height"].default
    if isinstance(fixed[0], int) and isinstance(fixed[1], int):
        return fixed[0], fixed[1]
    side = getattr(pipeline, "default_sample_size", None)
    if not isinstance(side, int):
        side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    factor = getattr(pipeline, "vae_scale_factor", 1)
    return (side * factor, side * factor) if isinstance(side, int) and isinstance(factor, int) else None
