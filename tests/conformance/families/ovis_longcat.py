"""Ovis-Image and LongCat-Image: FLUX-like transformers on language model text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import chat_tokenizer, qwen3
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import Qwen3Model

_SIZES: dict[str, Any] = {
    "patch_size": 1, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": ("blur", "low quality", "text")[i], "guidance_scale": 2.0 + i,
        "height": 32, "width": 32,
    }  # fmt: skip


def _long(i: int) -> dict[str, Any]:
    return {**_inputs(i), "max_sequence_length": 160}


def _verbatim(i: int) -> dict[str, Any]:
    return {**_inputs(i), "enable_prompt_rewrite": False}


def _parts(channels: int) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": tiny.vae(channels, shift_factor=0.1, scaling_factor=1.5),
    }  # fmt: skip


@case("OvisImagePipeline", "Ovis-Image", "text to image", _long)
def ovis() -> Any:
    transformer = OvisImageTransformer2DModel(in_channels=16, out_channels=16, **_SIZES)
    return OvisImagePipeline(
        **_parts(4), transformer=tiny.scaled(transformer, 1.5), text_encoder=qwen3(Qwen3Model),
        tokenizer=chat_tokenizer(256),
    )  # fmt: skip


@case("LongCatImagePipeline", "LongCat-Image", "text to image", _verbatim)
def longcat() -> Any:
    transformer = LongCatImageTransformer2DModel(in_channels=64, pooled_projection_dim=32, **_SIZES)
    return LongCatImagePipeline(
        **_parts(16), transformer=tiny.scaled(transformer, 1.5), text_encoder=tiny.qwen_image().text_encoder,
        tokenizer=tiny.tokenizer(1024), text_processor=None,
    )  # fmt: skip
