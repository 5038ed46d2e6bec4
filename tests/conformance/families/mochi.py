"""Mochi 1: an asymmetric joint transformer with masked text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 16, "width": 16,
            "num_frames": 7, "max_sequence_length": 16}  # fmt: skip


@case("MochiPipeline", "Mochi", "text to video", _text)
def text_to_video() -> Any:
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, text_embed_dim=32,
        time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    return MochiPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=vae.eval(), text_encoder=tiny.t5(32),
        tokenizer=tiny.tokenizer(16), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
