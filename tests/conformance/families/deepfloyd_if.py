"""DeepFloyd IF: diffusion in pixels, a small picture first."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_cascade import unet
from conformance.pictures import picture
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline

SIZE = 16


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 1.5 + i / 2, "output_type": "pt", "clean_caption": False}


def _upscaling_inputs(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i, SIZE), "height": SIZE, "width": SIZE, "noise_level": 150 + 50 * i}


def _parts(**settings: Any) -> dict[str, Any]:
    inner = unet(
        32, 0.8, sample_size=SIZE, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim=32, act_fn="gelu",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", addition_embed_type="text", addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", **settings,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        variance_type="learned_range",
    )  # fmt: skip
    return {
        "unet": inner, "scheduler": scheduler, "text_encoder": tiny.t5(), "tokenizer": tiny.tokenizer(77),
        "safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,
    }  # fmt: skip


@case("IFPipeline", "DeepFloyd IF", "text to image", _inputs)
def text_to_image() -> Any:
    return IFPipeline(**_parts(in_channels=3))


@case("IFSuperResolutionPipeline", "DeepFloyd IF", "upscaling", _upscaling_inputs)
def upscaling() -> Any:
    parts = _parts(in_channels=6, class_embed_type="timestep", mid_block_scale_factor=1.414)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)
