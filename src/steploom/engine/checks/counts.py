"""How many images, videos or waveforms a request comes to, as far as its arguments say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from steploom.media.pictures import leaves, shape_of
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionRequest

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "ensemble_size",
              "layers", "num_designs_per_prompt", "num_prompts_per_image")  # fmt: skip
"""Arguments that say how many times each prompt, or image, is made."""
_EITHER = ("num_images_per_prompt", "num_prompts_per_image")
"""Of which only one counts: UniDiffuser makes images of texts, or texts of images, or as many of both."""

_LEAST_DIMENSIONS = {"prompt_embeds": 3, "class_labels": 1, "image_embeds": 2, "image_embeddings": 2}
"""Arguments that have an entry for each image, and from how many dimensions on the first one counts these."""
_IMAGE = "image"
"""What has one, too, where no prompt is taken; beside a prompt several may be looked at for one image."""
_IDS, _MESSAGES = "input_ids", "messages"
"""What language models take for texts: a tensor of as many rows, one conversation or a list of several."""
_ENSEMBLE = "ensemble_size"
"""What takes it says with ``batch_size`` how much of an ensemble goes at once."""
_ROWS = ("prompt", _IMAGE, _IDS, _MESSAGES, *_LEAST_DIMENSIONS)


def counts(request: DiffusionRequest, info: PipelineInfo) -> dict[str, int]:
    """What multiplies the images of the request, where it is more than one: argument and number."""
    rows = {name: _rows(name, request.params.get(name)) for name in _LEAST_DIMENSIONS}
    rows |= {"prompt": len(request.prompt) if isinstance(request.prompt, list) else 1, _IMAGE: _images(request, info)}
    rows |= {_IDS: _texts(request.params.get(_IDS)), _MESSAGES: _conversations(request.params.get(_MESSAGES))}
    said = {name: count for name, count in rows.items() if count > 1}
    name = max(said, key=lambda name: said[name], default=None)
    # Several ways to say how many rows there are say the same; the largest counts.
    said = {} if name is None else {name: said[name]}
    times = {name: request.params.get(name) for name in PER_PROMPT}
    said |= {name: count for name, count in times.items() if isinstance(count, int) and count > 1}
    if said.keys() >= set(_EITHER):
        del said[min(_EITHER, key=lambda name: said[name])]
    batch = request.params.get("batch_size") or 1
    aside = said or any(parameter.name == _ENSEMBLE for parameter in info.parameters)
    return said if batch == 1 or aside else {"batch_size": batch}  # beside others it says how to go about it


def told(said: Mapping[str, Any]) -> str:
    """``num_frames=49, num_videos_per_prompt=64``; a list of prompts by its length."""
    return ", ".join(f"{name}: {count} of them" if name in _ROWS else f"{name}={count}" for name, count in said.items())


def pictures_in(leaf: Any) -> int:
    """How many pictures an array holds; 1 of anything else."""
    shape = shape_of(leaf) or ()
    return math.prod(shape[:-3]) if len(shape) > 3 else 1


def _rows(name: str, value: Any) -> int:
    """Entries of a list, and all rows of the tensors in it; 1 of anything else."""
    if isinstance(value, (list, tuple)):
        return sum(_rows(name, one) for one in cast("list[Any]", value))
    shape = shape_of(value) or ()
    return shape[0] if shape and len(shape) >= _LEAST_DIMENSIONS[name] else 1


def _texts(ids: Any) -> int:
    shape = shape_of(ids) or ()
    return shape[0] if len(shape) == 2 else 1


def _conversations(messages: Any) -> int:
    listed = cast("list[Any]", messages) if isinstance(messages, (list, tuple)) else []
    return sum(isinstance(one, (list, tuple)) for one in listed)


def _images(request: DiffusionRequest, info: PipelineInfo) -> int:
    if any(parameter.name == "prompt" for parameter in info.parameters) or not info.parameters:
        return 1
    return sum(map(pictures_in, leaves(_IMAGE, request.params.get(_IMAGE))))
