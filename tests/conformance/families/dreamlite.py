"""DreamLite: a small U-Net with grouped queries; source and result side by side."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import chat_tokenizer, qwen3_vl_generating, qwen3_vl_processor
from conformance.pictures import picture
from diffusers import AutoencoderTiny, DreamLitePipeline, DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32}


def _edited(i: int) -> dict[str, Any]:
    return _inputs(i) | {"image": picture(i), "image_guidance_scale": 1.5 + i}


def _pipeline() -> Any:
    unet = DreamLiteUNetModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16, ff_mult=2,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    pipeline = DreamLitePipeline(
        text_encoder=qwen3_vl_generating(), tokenizer=chat_tokenizer(256), processor=qwen3_vl_processor(256),
        vae=tiny.scaled(vae), unet=tiny.scaled(unet, 1.2),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    pipeline.prompt_template_encode_generate, pipeline.prompt_template_encode_generate_start_idx = "{}", 0
    pipeline.prompt_template_encode_edit_start_idx = 0
    pipeline.prompt_template_encode_edit = "<|vision_start|><|image_pad|><|vision_end|>{}"
    return pipeline


@case("DreamLitePipeline", "DreamLite", "text to image", _inputs)
def text_to_image() -> Any:
    return _pipeline()


@case("DreamLitePipeline", "DreamLite", "editing", _edited, variant="edit")
def edited() -> Any:
    return _pipeline()
