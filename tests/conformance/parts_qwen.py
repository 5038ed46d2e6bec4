"""Parts of the Qwen-Image pipelines that look at pictures."""

from __future__ import annotations

from typing import Any

import tiny
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor

_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_FIRST_MARK = 259
_HALVINGS = 6


class PictureProcessor(Qwen2VLProcessor):
    """The stock processor less videos, whose own processor needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def _transformer() -> Any:
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return tiny.scaled(model, 1.5)


def _text_encoder() -> Any:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
            "vocab_size": 270, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=_FIRST_MARK, video_token_id=_FIRST_MARK + 1, vision_start_token_id=_FIRST_MARK + 2,
        vision_end_token_id=_FIRST_MARK + 3,
    )  # fmt: skip
    return tiny.scaled(Qwen2_5_VLForConditionalGeneration(config), 1.5)


def seeing() -> dict[str, Any]:
    """Parts of the editing pipelines. They scale any picture to about a million pixels: the VAE shrinks that much."""
    tokenizer = tiny.tokenizer(1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * (_HALVINGS + 1), num_res_blocks=0,
        temperal_downsample=[False] * _HALVINGS, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return {
        "transformer": _transformer(), "vae": tiny.scaled(autoencoder, 1.5),
        "text_encoder": _text_encoder(), "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "processor": PictureProcessor(Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56), tokenizer),
    }  # fmt: skip
