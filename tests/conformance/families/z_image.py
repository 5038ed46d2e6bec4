"""Z-Image: one stream over picture and caption tokens, given as lists with one entry per sample."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import chat_tokenizer, mask, picture, qwen3
from conformance.pictures import adding, strength
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Model

FAMILY = "Z-Image"


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 2.0 + i, "height": 32, "width": 32, "max_sequence_length": 64}


_from_image = adding(_inputs, image=picture, strength=strength)
_inpainting = adding(_inputs, image=picture, mask_image=mask)
_control = adding(_inputs, control_image=picture)


def _parts(channels: int = 4) -> dict[str, Any]:
    transformer = ZImageTransformer2DModel(
        in_channels=channels, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return {
        "transformer": tiny.scaled(transformer, 1.5), "vae": tiny.vae(channels, shift_factor=0.1, scaling_factor=1.5),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "text_encoder": qwen3(Qwen3Model),
        "tokenizer": chat_tokenizer(),
    }  # fmt: skip


@case("ZImagePipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return ZImagePipeline(**_parts())


@case("ZImagePipeline", FAMILY, "text to image", _inputs, variant="long")
def text_to_image_long() -> Any:
    """Captions of both one and two of the model's blocks of 32 tokens."""
    parts = _parts()
    parts["tokenizer"].chat_template = "assistant: draws " + parts["tokenizer"].chat_template
    return ZImagePipeline(**parts)


@case("ZImageImg2ImgPipeline", FAMILY, "image to image", _from_image)
def image_to_image() -> Any:
    return ZImageImg2ImgPipeline(**_parts())


@case("ZImageInpaintPipeline", FAMILY, "inpainting", _inpainting)
def inpainting() -> Any:
    return ZImageInpaintPipeline(**_parts())


@case("ZImageControlNetPipeline", FAMILY, "control", _control)
def control() -> Any:
    net = ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    parts = _parts()
    parts["controlnet"] = tiny.scaled(net, 1.5, 7)
    return ZImageControlNetPipeline(**parts)
