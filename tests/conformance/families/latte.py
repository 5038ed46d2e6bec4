"""Latte: a transformer that alternates between frames and time."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_cascade import EQUAL_LENGTHS, ddim
from diffusers import LattePipeline, LatteTransformer3DModel


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 16, "width": 16, "video_length": 2,
        "clean_caption": False,
    }  # fmt: skip


def _padded_inputs(i: int) -> dict[str, Any]:
    return {**_inputs(i), "mask_feature": False}


def _equal_inputs(i: int) -> dict[str, Any]:
    return {**_inputs(i), "prompt": EQUAL_LENGTHS[i]}


def _pipeline() -> Any:
    transformer = LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, norm_type="ada_norm_single",
        activation_fn="gelu-approximate", norm_elementwise_affine=False, video_length=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return LattePipeline(
        transformer=tiny.scaled(transformer, 1.2), scheduler=ddim(), vae=tiny.vae(), text_encoder=tiny.t5(),
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip


@case("LattePipeline", "Latte", "text to video", _inputs)
def text_to_video() -> Any:
    return _pipeline()


@case("LattePipeline", "Latte", "text to video", _padded_inputs, variant="padded")
def padded() -> Any:
    return _pipeline()


@case("LattePipeline", "Latte", "text to video", _equal_inputs, variant="equal lengths")
def equal_lengths() -> Any:
    return _pipeline()
