"""Qwen-Image: a joint transformer on text of the prompt's own length."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_qwen
from conformance.case import PROMPTS, case
from conformance.parts_flux import mask, picture
from conformance.pictures import adding, strength
from diffusers import (
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
)

FAMILY = "Qwen-Image"


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": ("blur", "low quality", "text")[i], "true_cfg_scale": 2.0 + i,
        "height": 32, "width": 32,
    }  # fmt: skip


_from_image = adding(_inputs, image=picture, strength=strength)
_inpainting = adding(_from_image, mask_image=mask)
_control = adding(_inputs, control_image=picture, controlnet_conditioning_scale=0.8)


def controlnet(**settings: Any) -> Any:
    """A ControlNet for the tiny model."""
    net = QwenImageControlNetModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4), **settings,
    )  # fmt: skip
    return tiny.scaled(net, 1.5, 7)


def _editing(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "height": 512, "width": 512}


@case("QwenImagePipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return tiny.qwen_image()


@case("QwenImageImg2ImgPipeline", FAMILY, "image to image", _from_image)
def image_to_image() -> Any:
    return QwenImageImg2ImgPipeline(**tiny.qwen_image().components)


@case("QwenImageInpaintPipeline", FAMILY, "inpainting", _inpainting)
def inpainting() -> Any:
    return QwenImageInpaintPipeline(**tiny.qwen_image().components)


@case("QwenImageControlNetPipeline", FAMILY, "control", _control)
def control() -> Any:
    return QwenImageControlNetPipeline(**tiny.qwen_image().components, controlnet=controlnet())


@case("QwenImageEditPipeline", FAMILY, "editing", _editing)
def editing() -> Any:
    return QwenImageEditPipeline(**parts_qwen.seeing())


@case("QwenImageEditPlusPipeline", FAMILY, "editing", _editing)
def editing_plus() -> Any:
    return QwenImageEditPlusPipeline(**parts_qwen.seeing())
