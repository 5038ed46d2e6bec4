"""Motif-Video: a joint transformer whose guidance is a component of the pipeline."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AdaptiveProjectedGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from transformers import SiglipVisionConfig, T5Gemma2Encoder, T5Gemma2EncoderConfig, T5Gemma2TextConfig


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": ("bad", "worse", "ugly")[i], "height": 16, "width": 16,
            "num_frames": 5, "max_sequence_length": 16}  # fmt: skip


def _text_encoder() -> Any:
    text = T5Gemma2TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, head_dim=16,
        num_key_value_heads=2, vocab_size=tiny.VOCABULARY, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    text.dropout_rate = 0.0
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return tiny.scaled(T5Gemma2Encoder(config), 1.5, 3)


def _pipeline(**guidance: Any) -> Any:
    transformer = MotifVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2, patch_size=1,
        text_embed_dim=32, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return MotifVideoPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), text_encoder=_text_encoder(),
        tokenizer=tiny.tokenizer(16), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=AdaptiveProjectedGuidance(guidance_scale=4.0, **guidance),
    )  # fmt: skip


@case("MotifVideoPipeline", "Motif-Video", "text to video", _text)
def text_to_video() -> Any:
    return _pipeline()


@case("MotifVideoPipeline", "Motif-Video", "text to video", _text, variant="momentum")
def text_to_video_momentum() -> Any:
    """The guider remembers earlier steps of its request."""
    return _pipeline(adaptive_projected_guidance_momentum=-0.5)
