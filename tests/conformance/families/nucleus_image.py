"""Nucleus-Image: a sparse mixture of experts; ragged Qwen3-VL text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import LONG, qwen3_vl, qwen3_vl_processor, vae_qwen
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
)
from transformers import Qwen3VLForConditionalGeneration


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 512,
        "return_index": -2,
    }  # fmt: skip


def _ragged(i: int) -> dict[str, Any]:
    return _inputs(i) | {"prompt": LONG[i]}


def _pipeline() -> Any:
    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=32, axes_dims_rope=(8, 4, 4), mlp_ratio=8.0,
        num_experts=4, moe_intermediate_dim=16, capacity_factors=2.0, dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    return NucleusMoEImagePipeline(
        transformer=tiny.scaled(transformer, 1.5), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae_qwen(), text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, layers=3),
        processor=qwen3_vl_processor(512),
    )  # fmt: skip


@case("NucleusMoEImagePipeline", "Nucleus-Image", "text to image", _inputs)
def text_to_image() -> Any:
    return _pipeline()


@case("NucleusMoEImagePipeline", "Nucleus-Image", "text to image", _ragged, variant="ragged")
def ragged() -> Any:
    return _pipeline()
