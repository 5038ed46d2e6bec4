"""SkyReels V2: Wan's architecture, trained by diffusion forcing."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

parts.without_ftfy("skyreels_v2.pipeline_skyreels_v2")


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 16, "width": 16,
            "num_frames": 5, "max_sequence_length": 16}  # fmt: skip


@case("SkyReelsV2Pipeline", "SkyReels V2", "text to video", _text)
def text_to_video() -> Any:
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    return SkyReelsV2Pipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), text_encoder=parts.umt5(),
        tokenizer=tiny.tokenizer(16), scheduler=parts.flow_unipc(),
    )  # fmt: skip
