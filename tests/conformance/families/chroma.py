"""Chroma: FLUX without pooled text, with a mask over the text tokens."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import picture
from conformance.pictures import adding, strength
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

FAMILY = "Chroma"


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": ("blur", "low quality", "text")[i], "guidance_scale": 2.0 + i,
        "height": 32, "width": 32, "max_sequence_length": 16,
    }  # fmt: skip


_from_image = adding(_inputs, image=picture, strength=strength)


def _parts() -> dict[str, Any]:
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return {
        "transformer": tiny.scaled(transformer, 1.5), "vae": tiny.vae(shift_factor=0.1, scaling_factor=1.5),
        "scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder": tiny.t5(32), "tokenizer": tiny.tokenizer(),
    }  # fmt: skip


@case("ChromaPipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return ChromaPipeline(**_parts())


@case("ChromaImg2ImgPipeline", FAMILY, "image to image", _from_image)
def image_to_image() -> Any:
    return ChromaImg2ImgPipeline(**_parts())
