"""EasyAnimate 5.1: a joint transformer over Qwen2-VL text and video."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 16, "width": 16,
            "num_frames": 5}  # fmt: skip


def _qwen() -> Any:
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": tiny.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=250, video_token_id=251, vision_start_token_id=252,
        vision_end_token_id=253,
    )  # fmt: skip
    return tiny.scaled(Qwen2VLForConditionalGeneration(config), 1.5, 3)


@case("EasyAnimatePipeline", "EasyAnimate", "text to video", _text)
def text_to_video() -> Any:
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, mmdit_layers=1, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False
    )
    tokenizer = tiny.tokenizer(16)
    tokenizer.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    return EasyAnimatePipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=vae.eval(), text_encoder=_qwen(), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
