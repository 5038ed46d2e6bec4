"""HunyuanImage 2.1: Qwen2.5-VL and ByT5 (glyph) text, guidance in a component of its own."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)

_GLYPHS = ('a sign "red"', 'two "boats"', '"old" house')


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "height": 32, "width": 32}


def _distilled(i: int) -> dict[str, Any]:
    return _inputs(i) | {"distilled_guidance_scale": 2.0 + i}


def _glyphs(i: int) -> dict[str, Any]:
    return _inputs(i) | {"prompt": _GLYPHS[i]}


def _pipeline(guider: Any = None, *, distilled: bool = False) -> Any:
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=distilled, text_embed_dim=32, text_embed_2_dim=32,
        rope_axes_dim=(4, 4), use_meanflow=distilled,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=32, scaling_factor=0.476986,
    )  # fmt: skip
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=tiny.scaled(vae),
        text_encoder=tiny.qwen_image().text_encoder, tokenizer=tiny.tokenizer(64), text_encoder_2=tiny.t5(32),
        tokenizer_2=tiny.tokenizer(64), transformer=tiny.scaled(transformer, 1.5), guider=guider,
    )  # fmt: skip
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "{}", 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = 16
    return pipeline


@case("HunyuanImagePipeline", "HunyuanImage 2.1", "text to image", _inputs)
def guided() -> Any:
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2, adaptive_projected_guidance_scale=4)
    return _pipeline(guider)


@case("HunyuanImagePipeline", "HunyuanImage 2.1", "text to image", _glyphs, variant="glyphs")
def glyphs() -> Any:
    return _pipeline()


@case("HunyuanImagePipeline", "HunyuanImage 2.1", "text to image", _distilled, variant="distilled")
def distilled() -> Any:
    return _pipeline(distilled=True)
