"""Stable unCLIP: a prior makes an image embedding from the text, Stable Diffusion an image from both."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_sd as parts
from conformance.case import case
from diffusers import DDPMScheduler, PriorTransformer, StableUnCLIPPipeline, UnCLIPScheduler
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

FAMILY = "Stable unCLIP"


def _inputs(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"prior_guidance_scale": 2.0 + i, "prior_num_inference_steps": 2, "noise_level": 10 * i}


@case("StableUnCLIPPipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=2, num_embeddings=16
    )
    components = parts.parts(
        parts.ddim(prediction_type="v_prediction"), checked=False,
        class_embed_type="projection", projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    return StableUnCLIPPipeline(
        **components,
        prior_tokenizer=tiny.tokenizer(),
        prior_text_encoder=tiny.clip(seed=2),
        prior=tiny.scaled(prior, 1.2, 3),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
