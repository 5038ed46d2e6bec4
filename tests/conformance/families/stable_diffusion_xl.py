"""Stable Diffusion XL: a larger UNet with two text encoders, pooled text and sizes as further conditions."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_sd as parts
from conformance.case import case
from diffusers import (
    ControlNetUnionModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

FAMILY = "Stable Diffusion XL"


def _components(**changes: Any) -> dict[str, Any]:
    scheduler = EulerDiscreteScheduler(**parts.BETAS, timestep_spacing="leading", steps_offset=1)
    return parts.parts_xl(scheduler, **changes)


@case("StableDiffusionXLPipeline", FAMILY, "text to image", parts.sized)
def text_to_image() -> Any:
    return StableDiffusionXLPipeline(**_components())


def _pictured(i: int) -> dict[str, Any]:
    return parts.pictured(i) | {"strength": 0.8}


@case("StableDiffusionXLImg2ImgPipeline", FAMILY, "image to image", _pictured)
def image_to_image() -> Any:
    """The refiner: the second text encoder alone, and an aesthetic score in place of the target size."""
    components = _components(time_ids=5, cross_attention_dim=32)
    components |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return StableDiffusionXLImg2ImgPipeline(**components)


def _painted(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"image": parts.picture(i), "mask_image": parts.mask(i), "strength": 0.99}


@case("StableDiffusionXLInpaintPipeline", FAMILY, "inpainting", _painted)
def inpainting() -> Any:
    return StableDiffusionXLInpaintPipeline(**_components(in_channels=9))


@case("StableDiffusionXLInpaintPipeline", FAMILY, "inpainting", _painted, variant="text-to-image-unet")
def inpainting_plain_unet() -> Any:
    return StableDiffusionXLInpaintPipeline(**_components())


@case("StableDiffusionXLControlNetPipeline", FAMILY, "control", parts.pictured)
def controlnet() -> Any:
    return StableDiffusionXLControlNetPipeline(**_components(), controlnet=parts.controlnet_xl())


def _one_mode(i: int) -> dict[str, Any]:
    return parts.text(i) | {"control_image": [parts.picture(i)], "control_mode": [3]}


# controlnet_union.py: nn.MultiheadAttention without batch_first, given [rows, tokens, channels].
@case(
    "StableDiffusionXLControlNetUnionPipeline", FAMILY, "control", _one_mode,
    alone="merged differs from alone",  # the ControlNet's task attention runs over the batch axis
)  # fmt: skip
def controlnet_union() -> Any:
    net = parts.controlnet_xl(
        ControlNetUnionModel, num_trans_channel=16, num_trans_head=2, num_proj_channel=16
    )  # fmt: skip
    return StableDiffusionXLControlNetUnionPipeline(**_components(), controlnet=net)


@case("StableDiffusionXLAdapterPipeline", FAMILY, "control", parts.pictured)
def t2i_adapter() -> Any:
    adapter = T2IAdapter(channels=[16, 32, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
    scheduler = EulerAncestralDiscreteScheduler(**parts.BETAS)
    return StableDiffusionXLAdapterPipeline(**parts.parts_xl(scheduler), adapter=tiny.scaled(adapter, 1.2, 7))


@case("StableDiffusionXLPAGPipeline", FAMILY, "text to image", parts.perturbed)
def perturbed_attention() -> Any:
    return StableDiffusionXLPAGPipeline(**_components(), pag_applied_layers="mid")


def _edited(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"image": parts.picture(i), "image_guidance_scale": 1.5 + 0.5 * i}


@case("StableDiffusionXLInstructPix2PixPipeline", FAMILY, "editing", _edited)
def instruct_pix2pix() -> Any:
    return StableDiffusionXLInstructPix2PixPipeline(**_components(in_channels=8))
