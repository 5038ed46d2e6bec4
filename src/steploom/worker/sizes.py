"""Which sizes a pipeline takes, found out by asking it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

from steploom.weave import signatures, untyped

log = logging.getLogger(__name__)

_LARGEST = 512
_REFUSED = re.compile(r"divisible|multiple", re.IGNORECASE)
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
