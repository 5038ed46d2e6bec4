"""Stable Cascade and its forerunner Wuerstchen: a prior and a decoder in a strongly compressed latent space."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, case
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    WuerstchenCombinedPipeline,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

CHANNELS = 4
WIDTH = 32


def _prior_inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 128, "width": 128, "output_type": "pt"}


def _decoder_inputs(i: int) -> dict[str, Any]:
    embeddings = torch.randn(1, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(i))
    return {"prompt": PROMPTS[i], "guidance_scale": 2.0 + i, "image_embeddings": embeddings}


def _combined_inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "prior_guidance_scale": 4.0 + i, "decoder_guidance_scale": 2.0 + i, "height": 128,
        "width": 128, "prior_num_inference_steps": 2,
    }  # fmt: skip


def _unet(**settings: Any) -> Any:
    unet = StableCascadeUNet(
        in_channels=CHANNELS, out_channels=CHANNELS, timestep_ratio_embedding_dim=16, conditioning_dim=WIDTH,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=WIDTH, dropout=0.0, **settings,
    )  # fmt: skip
    return tiny.scaled(unet, 1.2)


def _prior() -> Any:
    return _unet(switch_level=(False,), clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH)


def _decoder() -> Any:
    return _unet(patch_size=2, effnet_in_channels=CHANNELS, timestep_conditioning_type=("sca",))


def _vqgan() -> Any:
    return tiny.scaled(PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8), 1.0, 5)


def _texts(*, projected: bool, seed: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}text_encoder": tiny.clip(WIDTH, projected=projected, seed=seed),
        f"{prefix}tokenizer": tiny.tokenizer(),
    }  # fmt: skip


@case("StableCascadePriorPipeline", "Stable Cascade", "text to embeddings", _prior_inputs)
def prior() -> Any:
    return StableCascadePriorPipeline(
        prior=_prior(), scheduler=DDPMWuerstchenScheduler(), **_texts(projected=True, seed=1)
    )


@case("StableCascadeDecoderPipeline", "Stable Cascade", "embeddings to image", _decoder_inputs)
def decoder() -> Any:
    return StableCascadeDecoderPipeline(
        decoder=_decoder(), scheduler=DDPMWuerstchenScheduler(), vqgan=_vqgan(), **_texts(projected=True, seed=1)
    )


@case("StableCascadeCombinedPipeline", "Stable Cascade", "text to image", _combined_inputs)
def combined() -> Any:
    return StableCascadeCombinedPipeline(
        prior_prior=_prior(), prior_scheduler=DDPMWuerstchenScheduler(), decoder=_decoder(), vqgan=_vqgan(),
        scheduler=DDPMWuerstchenScheduler(), **_texts(projected=True, seed=1),
        **_texts(projected=True, seed=2, prefix="prior_"),
    )  # fmt: skip


@case("WuerstchenCombinedPipeline", "Wuerstchen", "text to image", _combined_inputs)
def forerunner() -> Any:
    prior = WuerstchenPrior(c_in=CHANNELS, c=16, depth=2, c_cond=WIDTH, c_r=16, nhead=2)
    decoder = WuerstchenDiffNeXt(
        c_r=16, c_cond=WIDTH, c_hidden=[16, 16], nhead=[-1, 2], blocks=[1, 1], level_config=["CT", "CTA"],
        inject_effnet=[False, True], effnet_embd=CHANNELS, clip_embd=WIDTH, dropout=[0.0, 0.0],
    )  # fmt: skip
    return WuerstchenCombinedPipeline(
        prior_prior=tiny.scaled(prior, 1.2), prior_scheduler=DDPMWuerstchenScheduler(),
        decoder=tiny.scaled(decoder, 1.2), vqgan=_vqgan(), scheduler=DDPMWuerstchenScheduler(),
        **_texts(projected=False, seed=1), **_texts(projected=False, seed=2, prefix="prior_"),
    )  # fmt: skip
