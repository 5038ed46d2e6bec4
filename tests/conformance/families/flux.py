"""FLUX.1: rectified flow with double and single stream blocks, guidance distilled."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import mask, picture
from conformance.pictures import adding, strength
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


_from_image = adding(_inputs, image=picture, strength=strength)
_inpainting = adding(_from_image, mask_image=mask)
_fill = adding(_inputs, image=picture, mask_image=mask)
_control = adding(_inputs, control_image=picture)
_controlnet = adding(_control, controlnet_conditioning_scale=0.8)


def _true_guidance(i: int) -> dict[str, Any]:
    return {**_inputs(i), "true_cfg_scale": 2.0 + i, "negative_prompt": ("blur", "low quality", "text")[i]}


def _editing(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "max_area": 32 * 32, "_auto_resize": False}


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
