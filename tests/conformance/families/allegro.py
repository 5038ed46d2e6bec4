"""Allegro: a video transformer with cross-attention to T5."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 16, "width": 16,
            "num_frames": 8, "max_sequence_length": 16, "clean_caption": False}  # fmt: skip


@case("AllegroPipeline", "Allegro", "text to video", _text)
def text_to_video() -> Any:
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    vae.enable_tiling()
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    return AllegroPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=vae.eval(), text_encoder=tiny.t5(24),
        tokenizer=tiny.tokenizer(16), scheduler=scheduler,
    )  # fmt: skip
