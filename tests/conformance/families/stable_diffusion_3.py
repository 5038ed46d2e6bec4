"""Stable Diffusion 3: rectified flow with a joint transformer."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import certain, mask, picture
from conformance.pictures import adding, strength
from diffusers import (
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
)

FAMILY = "Stable Diffusion 3"
_SIZES: dict[str, Any] = {
    "sample_size": 16, "patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
    "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 64, "pos_embed_max_size": 32,
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 32, "width": 32, "max_sequence_length": 16}


_from_image = adding(_inputs, image=picture, strength=strength)
_inpainting = adding(_from_image, mask_image=mask)
_control = adding(_inputs, control_image=picture, controlnet_conditioning_scale=0.8)


def _perturbed(i: int) -> dict[str, Any]:
    return {**_inputs(i), "pag_scale": 1.0 + i}


@case("StableDiffusion3Pipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return tiny.sd3()


@case("StableDiffusion3Img2ImgPipeline", FAMILY, "image to image", _from_image)
def image_to_image() -> Any:
    return StableDiffusion3Img2ImgPipeline(**tiny.sd3().components)


@case("StableDiffusion3InpaintPipeline", FAMILY, "inpainting", _inpainting)
def inpainting() -> Any:
    transformer = tiny.scaled(SD3Transformer2DModel(in_channels=16, out_channels=16, **_SIZES))
    vae = tiny.vae(16, shift_factor=0.1, scaling_factor=1.5)
    return StableDiffusion3InpaintPipeline(**{**tiny.sd3().components, "transformer": transformer, "vae": vae})


@case("StableDiffusion3ControlNetPipeline", FAMILY, "control", _control)
def control() -> Any:
    controlnet = tiny.scaled(SD3ControlNetModel(in_channels=4, out_channels=4, **_SIZES), seed=7)
    parts = tiny.sd3().components
    certain(parts["vae"])  # the pipeline encodes the control image with the global generator, not the request's
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet)


@case("StableDiffusion3PAGPipeline", FAMILY, "text to image", _perturbed)
def perturbed_attention() -> Any:
    parts = {name: part for name, part in tiny.sd3().components.items() if part is not None}
    return StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1")
