"""unCLIP (Karlo): a prior, a decoder in pixels and two upscalers."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_cascade import unet
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

WIDTH = 32


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "prior_guidance_scale": 3.0 + i, "decoder_guidance_scale": 4.0 + i,
        "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip


def _upscaler(seed: int) -> Any:
    model = UNet2DModel(
        sample_size=16, layers_per_block=1, down_block_types=("ResnetDownsampleBlock2D",) * 2, in_channels=6,
        up_block_types=("ResnetUpsampleBlock2D",) * 2, block_out_channels=(16, 32), norm_num_groups=4, out_channels=3,
    )  # fmt: skip
    return tiny.scaled(model, 1.2, seed)


@case(
    "UnCLIPPipeline", "unCLIP (Karlo)", "text to image", _inputs, steps=(2, 2, 2),
    steps_name="decoder_num_inference_steps",
)  # fmt: skip
def text_to_image() -> Any:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=16
    )
    decoder = unet(
        WIDTH, sample_size=16, in_channels=3, out_channels=6, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), class_embed_type="identity",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    projection = UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH)
    fixed = {"variance_type": "fixed_small_log", "num_train_timesteps": 1000}
    return UnCLIPPipeline(
        prior=tiny.scaled(prior, 1.5), decoder=decoder, text_encoder=tiny.clip(WIDTH), tokenizer=tiny.tokenizer(),
        text_proj=tiny.scaled(projection, 1.2), super_res_first=_upscaler(3), super_res_last=_upscaler(4),
        prior_scheduler=UnCLIPScheduler(**fixed, prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"), super_res_scheduler=UnCLIPScheduler(**fixed),
    )  # fmt: skip
