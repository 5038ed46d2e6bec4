"""What a request's pipeline is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steploom.errors import InvalidRequest
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.weave import callbacks, signatures
from steploom.weave.modules.shared import own_containers
from steploom.worker.models.loading import denoiser_of

_PROJECTIONS = ("encoder_hid_proj", "image_proj")
"""Where a denoiser has what an IP-Adapter makes of pictures."""


def arguments(
    request: DiffusionRequest, info: PipelineInfo, pipeline: Any, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call, by name.

    Args:
        request: What is asked for.
        info: What ``pipeline`` accepts.
        pipeline: The one that does it.
        changes: Other values of some of them.

    Raises:
        InvalidRequest: The pipeline has no such argument, or not what goes with it.
    """
    accepted = {parameter.name for parameter in info.parameters}
    given = {**request.params, **({} if request.prompt is None else {"prompt": request.prompt}), **changes}
    made = {n: own_containers(v) for n, v in given.items()}  # Z-Image writes into its prompts, GLIGEN into a dict
    if "output_type" in accepted:
        made.setdefault("output_type", signatures.output_type(pipeline, request.output_type))
    if request.seed is not None and "generator" in accepted:
        made["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    unknown = made.keys() - accepted
    if unknown:
        raise InvalidRequest(f"{min(unknown)}: {info.pipeline_class} takes no such argument", field=min(unknown))
    _refuse_pictures_for_nobody(made, pipeline)
    return callbacks.watch(made)


def _refuse_pictures_for_nobody(given: Mapping[str, Any], pipeline: Any) -> None:
    """Refuses pictures for an IP-Adapter where none is loaded: some pipelines fail at them, others leave them out."""
    denoiser = denoiser_of(pipeline)
    loaded = any(getattr(denoiser, name, None) is not None for name in _PROJECTIONS)
    for name, value in given.items():
        if "ip_adapter_image" in name and value is not None and not loaded:
            raise InvalidRequest(
                f"{name}: {type(pipeline).__name__} has no IP-Adapter; load one (pipe.load_ip_adapter(...)) into the "
                "pipeline that the engine is made from, or leave it out",
                field=name,
            )
