"""Helios: video in chunks, each continuing a compressed history."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

parts.without_ftfy("helios.pipeline_helios")


def _text(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "height": 16, "width": 16,
        "num_frames": 9, "max_sequence_length": 16, "num_latent_frames_per_chunk": 3,
    }  # fmt: skip


@case("HeliosPipeline", "Helios", "text to video", _text)
def text_to_video() -> Any:
    transformer = HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_dim=(4, 4, 4),
    )  # fmt: skip
    return HeliosPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), text_encoder=parts.umt5(),
        tokenizer=tiny.tokenizer(16),
        scheduler=HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
    )  # fmt: skip
