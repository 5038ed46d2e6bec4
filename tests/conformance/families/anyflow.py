"""AnyFlow: Wan's architecture, distilled to jump between any two noise levels."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "height": 16, "width": 16,
            "num_frames": 5, "max_sequence_length": 16}  # fmt: skip


@case("AnyFlowPipeline", "AnyFlow", "text to video", _text)
def text_to_video() -> Any:
    transformer = AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    return AnyFlowPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), text_encoder=parts.umt5(),
        tokenizer=tiny.tokenizer(16), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip
