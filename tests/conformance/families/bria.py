"""Bria 3.2 and FIBO: FLUX-like transformers; FIBO reads every layer of its language model."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import SmolLM3Config, SmolLM3ForCausalLM

_SIZES: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": ("blur", "low quality", "text")[i], "guidance_scale": 2.0 + i,
        "height": 64, "width": 64, "max_sequence_length": 16,
    }  # fmt: skip


@case("BriaPipeline", "Bria 3.2", "text to image", _inputs)
def text_to_image() -> Any:
    return BriaPipeline(
        transformer=tiny.scaled(BriaTransformer2DModel(joint_attention_dim=32, **_SIZES), 1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=tiny.t5(32), tokenizer=tiny.tokenizer(),
    )  # fmt: skip


@case("BriaFiboPipeline", "FIBO", "text to image", _inputs)
def structured_text_to_image() -> Any:
    language = SmolLM3ForCausalLM(
        SmolLM3Config(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = BriaFiboTransformer2DModel(joint_attention_dim=64, text_encoder_dim=32, **_SIZES)
    return BriaFiboPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=tiny.scaled(autoencoder), tokenizer=tiny.tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=tiny.scaled(language, 1.5),
    )  # fmt: skip
