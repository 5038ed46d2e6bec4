"""Parts that several families share: pictures, CLIP vision encoders, text-conditioned U-Nets."""

from __future__ import annotations

from typing import Any

import tiny
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

EQUAL_LENGTHS = ("a red circle", "three boats!", "an old house")
"""Prompts of as many tokens each, for models that see the text's own length and take no mask for it."""

BYTES = 256
"""Of a pixel channel."""


def image_encoder(width: int = 32, size: int = 32) -> Any:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=width, num_attention_heads=4, num_hidden_layers=2,
        image_size=size, patch_size=size // 2,
    )  # fmt: skip
    return tiny.scaled(CLIPVisionModelWithProjection(config), 1.5, 11)


def image_processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)


def unet(width: int = 32, factor: float = 1.2, **settings: Any) -> Any:
    parts = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4, "cross_attention_dim": width,
    }  # fmt: skip
    return tiny.scaled(UNet2DConditionModel(**{**parts, **settings}), factor)


def movq(**extra: Any) -> Any:
    model = VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), layers_per_block=1, latent_channels=4,
        norm_num_groups=4, norm_type="spatial", vq_embed_dim=4, **{"num_vq_embeddings": 12, **extra},
    )  # fmt: skip
    return tiny.scaled(model, 1.0, 5)


def ddim(*, clip_sample: bool = False) -> Any:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=clip_sample, steps_offset=1)
