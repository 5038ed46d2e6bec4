"""Ways of asking a pipeline for samples: how many a request wants, and how to ask for twice as many."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from steploom.requests import DiffusionRequest

_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def samples(request: DiffusionRequest) -> int:
    """Samples that a request asks for: prompts, or rows of embeddings in their place, times those of each."""
    prompts = [len(request.prompt) if isinstance(request.prompt, (list, tuple)) else 1]
    given = [value for name, value in request.params.items() if "prompt" in name and isinstance(value, torch.Tensor)]
    each = [count for name in _PER_PROMPT if isinstance(count := request.params.get(name), int)]
    return max(1, max(prompts + [value.shape[0] for value in given if value.ndim > 1]) * max([1, *each]))


def doubled(request: DiffusionRequest, accepted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Changes to the arguments of ``request``, in the ways that diffusers has for it.

    Args:
        request: As it came.
        accepted: Arguments of its pipeline.
    """
    # Not the request's generators, which are not to be advanced; nor torch's own, which are the application's.
    plain = {"generator": torch.Generator("cpu").manual_seed(0), "callback_on_step_end": None, "callback": None}
    for argument in _PER_PROMPT:
        if argument in accepted:
            count = 2 * (request.params.get(argument) or 1)
            yield {**plain, argument: count, "latents": None}
    prompts, negative = request.prompt, request.params.get("negative_prompt")
    if isinstance(prompts, str):
        negatives = {"negative_prompt": [negative] * 2} if isinstance(negative, str) else {}
        yield {**plain, **negatives, "prompt": [prompts] * 2, "latents": None}
    elif prompts is not None:  # a negative prompt that is one stands for all
        negatives = {"negative_prompt": [*negative, *negative]} if isinstance(negative, (list, tuple)) else {}
        yield {**plain, **negatives, "prompt": [*prompts, *prompts], "latents": None}
    # Flux and Wan repeat a prompt for each image, but not embeddings that are given in its place.
    given = {name: value for name, value in request.params.items() if "prompt" in name}
    embeddings = {n: torch.cat([v] * 2) for n, v in given.items() if isinstance(v, torch.Tensor) and v.ndim > 1}
    if embeddings:
        yield {**plain, **embeddings, "latents": None}
