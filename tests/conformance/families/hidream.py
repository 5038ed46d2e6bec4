"""HiDream-I1: four text encoders, routed experts."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import llama
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 16}


@case("HiDreamImagePipeline", "HiDream-I1", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 32], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(), text_encoder=tiny.clip(seed=1),
        tokenizer=tiny.tokenizer(), text_encoder_2=tiny.clip(seed=2), tokenizer_2=tiny.tokenizer(),
        text_encoder_3=tiny.t5(32), tokenizer_3=tiny.tokenizer(), text_encoder_4=llama(),
        tokenizer_4=tiny.tokenizer(), transformer=tiny.scaled(transformer, 1.5),
    )  # fmt: skip
    pipeline.default_sample_size = 16
    return pipeline
