"""Kandinsky 2: a prior makes image embeddings from text, a U-Net makes latents from those."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, case
from conformance.parts_cascade import ddim, image_encoder, image_processor, movq, unet
from diffusers import (
    DDPMScheduler,
    KandinskyCombinedPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from steploom.worker.trials import trial

WIDTH = 32


def _prior_inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "output_type": "pt"}


def _decoder_inputs(i: int) -> dict[str, Any]:
    embeds = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(i)).unbind()
    return {
        "image_embeds": embeds[0], "negative_image_embeds": embeds[1], "guidance_scale": 4.0 + i, "height": 64,
        "width": 64,
    }  # fmt: skip


def _combined_inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "prior_guidance_scale": 3.0 + i, "height": 64, "width": 64,
        "prior_num_inference_steps": 2,
    }  # fmt: skip


def _staggered_inputs(i: int) -> dict[str, Any]:
    return {**_combined_inputs(i), "prior_num_inference_steps": 2 + i}


def _pixel_inputs(i: int) -> dict[str, Any]:
    return {**_combined_inputs(i), "output_type": "pt"}


def _prior_parts() -> dict[str, Any]:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=77,
        additional_embeddings=4,
    )  # fmt: skip
    return {
        "prior": tiny.scaled(prior, 1.5), "image_encoder": image_encoder(WIDTH), "text_encoder": tiny.clip(WIDTH),
        "tokenizer": tiny.tokenizer(77), "image_processor": image_processor(),
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
    }  # fmt: skip


def _unet(**settings: Any) -> Any:
    return unet(
        WIDTH, out_channels=8, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=WIDTH, resnet_time_scale_shift="scale_shift",
        **settings,
    )  # fmt: skip


def image_unet(**settings: Any) -> Any:
    """The U-Net of Kandinsky 2.2."""
    return _unet(addition_embed_type="image", encoder_hid_dim_type="image_proj", class_embed_type=None, **settings)


def combined_parts() -> dict[str, Any]:
    """All of a combined pipeline but U-Net and noise scheduler."""
    return {"movq": movq(), **{f"prior_{name}": part for name, part in _prior_parts().items()}}


@case("KandinskyV22PriorPipeline", "Kandinsky 2.2", "text to embeddings", _prior_inputs)
def prior() -> Any:
    return KandinskyV22PriorPipeline(**_prior_parts())


@case("KandinskyV22Pipeline", "Kandinsky 2.2", "embeddings to image", _decoder_inputs)
def decoder() -> Any:
    return KandinskyV22Pipeline(unet=image_unet(), scheduler=DDPMScheduler(clip_sample=False), movq=movq())


@case("KandinskyV22CombinedPipeline", "Kandinsky 2.2", "text to image", _combined_inputs)
def combined() -> Any:
    return KandinskyV22CombinedPipeline(
        unet=image_unet(), scheduler=DDPMScheduler(clip_sample=False), **combined_parts()
    )


@case(
    "KandinskyV22CombinedPipeline", "Kandinsky 2.2", "text to image", _staggered_inputs, variant="staggered",
    alone=trial.APART,
)  # fmt: skip
def staggered() -> Any:
    return combined()


@case("KandinskyCombinedPipeline", "Kandinsky 2.1", "text to image", _pixel_inputs)
def combined_first() -> Any:
    config = MCLIPConfig(
        transformerDimSize=WIDTH, imageDimSize=WIDTH, hidden_size=WIDTH, intermediate_size=64, num_attention_heads=4,
        num_hidden_layers=2, vocab_size=tiny.VOCABULARY, max_position_embeddings=80,
    )  # fmt: skip
    return KandinskyCombinedPipeline(
        unet=_unet(addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"),
        text_encoder=tiny.scaled(MultilingualCLIP(config), 1.5), tokenizer=tiny.tokenizer(77),
        scheduler=ddim(clip_sample=True), **combined_parts(),
    )  # fmt: skip
