"""Whether the size, the share of the steps, ids and the kind of output are such as the pipeline makes, or knows."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from steploom.engine.checks.arguments import STEP_LISTS
from steploom.errors import InvalidRequest
from steploom.given import is_number
from steploom.media.pictures import brief, leaves, shape_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import FRAMES, pictures_among
from steploom.requests import DiffusionRequest

_SIZES = ("width", "height")
_BINNING = "use_resolution_binning"
"""With it, which is the default, a pipeline makes the nearest of the sizes that it was trained for."""


def check_fits(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses what the pipeline cannot make; counts are known to be integers.

    Raises:
        InvalidRequest: Names the field, its value and the mend.
    """
    unbinned = not request.params.get(_BINNING, True)
    of = info.size_multiple_unbinned if unbinned else info.size_multiple
    if pictures_among(request.params, info):
        of = math.lcm(of, info.size_multiple_pictured)
    for name, only in zip(_SIZES, info.size_only or (None, None), strict=True):
        value = request.params.get(name)
        if value is not None:
            _check_side(name, value, info, of, only)
    _check_frames(request, info)
    _check_share(request, info)
    _check_ids(request, info)
    _check_output_type(request, info)


def _check_side(name: str, value: int, info: PipelineInfo, of: int, only: int | None) -> None:
    if value % of:
        below, above = value - value % of, value - value % of + of
        nearest = f"{below} or {above}" if below else f"{above}"
        raise InvalidRequest(
            f"{name}={value}: {info.pipeline_class} takes multiples of {of}; the nearest is {nearest}", field=name
        )
    if value < info.size_least:
        raise InvalidRequest(f"{name}={value}: {info.pipeline_class} makes at least {info.size_least}", field=name)
    if only is not None and value != only:
        raise InvalidRequest(f"{name}={value}: this {info.pipeline_class} has positions for {only} alone", field=name)
    if info.size_most is not None and value > info.size_most:
        raise InvalidRequest(
            f"{name}={value}: this {info.pipeline_class} has positions for at most {info.size_most}", field=name
        )


def _check_frames(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses a number of frames at which the pipeline would fail; others it rounds."""
    of, only = info.frame_multiple, info.frames_only
    for name in FRAMES:
        count: Any = request.params.get(name)
        if not isinstance(count, int):
            continue  # not given, or the pictures themselves
        said, this = f"{name}={count}", f"this {info.pipeline_class}"
        if info.frames_strict and (count - 1) % of:
            below = count - (count - 1) % of
            mend = f"takes multiples of {of} and one more; the nearest is {below} or {below + of}"
            raise InvalidRequest(f"{said}: {info.pipeline_class} {mend}", field=name)
        if count < info.frames_least:
            raise InvalidRequest(f"{said}: {info.pipeline_class} makes at least {info.frames_least}", field=name)
        if only is not None and count not in (1, only):
            raise InvalidRequest(f"{said}: {this} has positions for {only} frames, or 1", field=name)
        if info.frames_most is not None and count > info.frames_most:
            raise InvalidRequest(f"{said}: {this} has positions for at most {info.frames_most}", field=name)


def _check_share(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses a share of the steps, such as ``strength``, that is none, or leaves none of them."""
    name = info.shortened_by
    share: Any = request.params.get(name)
    if not name or share is None or request.params.get("denoising_start") is not None:  # which then says it
        return
    if not is_number(share) or not 0 < share <= 1:
        raise InvalidRequest(f"{name}={brief(share)}: must be a number greater than 0, and at most 1", field=name)
    lists = (value for key, value in request.params.items() if key in STEP_LISTS and isinstance(value, Sized))
    steps = next(map(len, lists), request.params.get("num_inference_steps") or info.default_steps)
    if steps is None or (math.ceil if info.shortened_up else int)(steps * share) >= 1:
        return
    raise InvalidRequest(
        f"{name}={share!r}: leaves none of {steps} steps; give {math.ceil(100 / steps) / 100:g} or more, or more steps",
        field=name,
    )


def _check_ids(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses ids of which the model has none: looking one up would fail, and on a GPU not for this request alone."""
    for name, count in info.ids.items():
        value = request.params.get(name)
        for leaf in leaves(name, value):
            numbers = leaf.flatten().tolist() if shape_of(leaf) is not None else [leaf]
            if any(isinstance(one, int) and not 0 <= one < count for one in numbers):
                raise InvalidRequest(
                    f"{name}={brief(value)}: this {info.pipeline_class} has ids from 0 to {count - 1}", field=name
                )


def _check_output_type(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses what the pipeline would refuse once all is done, or take for another; ``"pil"`` is the usual one."""
    wanted, taken = request.output_type, info.output_types
    if info.decoder_left_out and wanted != "latent":
        raise InvalidRequest(
            f"output_type={brief(wanted)}: this {info.pipeline_class} was loaded without its {info.decoder_left_out}, "
            "and makes nothing but latents; give output_type='latent'",
            field="output_type",
        )
    if not taken or wanted in (*taken, "pil"):
        return
    choice = ", ".join(map(repr, taken))
    raise InvalidRequest(f"output_type={brief(wanted)}: {info.pipeline_class} makes {choice}", field="output_type")
