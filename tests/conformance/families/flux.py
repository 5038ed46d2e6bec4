"""FLUX.1: rectified flow with double and single stream blocks, guidance distilled."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import mask, picture
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)

FAMILY = "FLUX.1"
_SIZES: dict[str, Any] = {
    "patch_size": 1, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 2.0 + 2 * i, "height": 32, "width": 32, "max_sequence_length": 16}


def _true_guidance(i: int) -> dict[str, Any]:
    return {**_inputs(i), "true_cfg_scale": 2.0 + i, "negative_prompt": ("blur", "low quality", "text")[i]}


def _from_image(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "strength": (0.5, 0.7, 0.6)[i]}


def _inpainting(i: int) -> dict[str, Any]:
    return {**_from_image(i), "mask_image": mask(i)}


def _fill(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "mask_image": mask(i)}


def _editing(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "max_area": 32 * 32, "_auto_resize": False}


def _control(i: int) -> dict[str, Any]:
    return {**_inputs(i), "control_image": picture(i)}


def _controlnet(i: int) -> dict[str, Any]:
    return {**_control(i), "controlnet_conditioning_scale": 0.8}


def _parts(**others: Any) -> dict[str, Any]:
    return {**tiny.flux().components, **others}


def _widened(in_channels: int) -> dict[str, Any]:
    """Parts for pipelines that concatenate further channels to the latents."""
    transformer = FluxTransformer2DModel(in_channels=in_channels, out_channels=16, **_SIZES)
    parts = _parts(transformer=tiny.scaled(transformer, 1.5))
    return {name: part for name, part in parts.items() if part is not None}


@case("FluxPipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return tiny.flux()


@case("FluxPipeline", FAMILY, "text to image", _true_guidance, variant="true-guidance")
def true_guidance() -> Any:
    return tiny.flux()


@case("FluxImg2ImgPipeline", FAMILY, "image to image", _from_image)
def image_to_image() -> Any:
    return FluxImg2ImgPipeline(**_parts())


@case("FluxInpaintPipeline", FAMILY, "inpainting", _inpainting)
def inpainting() -> Any:
    return FluxInpaintPipeline(**_parts())


@case("FluxFillPipeline", FAMILY, "inpainting", _fill)
def fill() -> Any:
    return FluxFillPipeline(**_widened(48))


@case("FluxKontextPipeline", FAMILY, "editing", _editing)
def editing() -> Any:
    return FluxKontextPipeline(**_parts())


@case("FluxControlPipeline", FAMILY, "control", _control)
def control() -> Any:
    return FluxControlPipeline(**_widened(32))


@case("FluxControlNetPipeline", FAMILY, "control", _controlnet)
def controlnet() -> Any:
    net = FluxControlNetModel(in_channels=16, **_SIZES)
    return FluxControlNetPipeline(**_parts(), controlnet=tiny.scaled(net, 1.5, 7))
