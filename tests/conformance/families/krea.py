"""Krea 2: several layers of Qwen3-VL's hidden states per text token."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import chat_tokenizer, qwen3_vl, vae_qwen
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 18}


@case("Krea2Pipeline", "Krea 2", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=2,
        text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae_qwen(), text_encoder=qwen3_vl(),
        tokenizer=chat_tokenizer(), transformer=tiny.scaled(transformer, 1.5), text_encoder_select_layers=(1, 2),
    )  # fmt: skip
    pipeline.prompt_template_encode_prefix = pipeline.prompt_template_encode_suffix = ""
    pipeline.prompt_template_encode_start_idx, pipeline.prompt_template_encode_num_suffix_tokens = 0, 2
    return pipeline
