"""Latent consistency models: Stable Diffusion distilled to few steps, guidance an embedding."""

from __future__ import annotations

from typing import Any

from conformance import parts_sd as parts
from conformance.case import case
from diffusers import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline, LCMScheduler

FAMILY = "Latent Consistency Models"


def _components() -> dict[str, Any]:
    return parts.parts(LCMScheduler(**parts.BETAS, original_inference_steps=50), time_cond_proj_dim=32)


@case("LatentConsistencyModelPipeline", FAMILY, "text to image", parts.sized)
def text_to_image() -> Any:
    return LatentConsistencyModelPipeline(**_components())


@case("LatentConsistencyModelImg2ImgPipeline", FAMILY, "image to image", parts.pictured)
def image_to_image() -> Any:
    return LatentConsistencyModelImg2ImgPipeline(**_components())
