"""AuraFlow: rectified flow with joint and then single blocks."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 16, "width": 16, "max_sequence_length": 16}


@case("AuraFlowPipeline", "AuraFlow", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    return AuraFlowPipeline(
        tokenizer=tiny.tokenizer(), text_encoder=tiny.t5(32, UMT5EncoderModel, UMT5Config), vae=tiny.vae(),
        transformer=tiny.scaled(transformer, 1.5), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
