"""Stable Video Diffusion: image to video."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import case
from conformance.parts_cascade import image_encoder, image_processor
from conformance.pictures import picture
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)


def _inputs(i: int) -> dict[str, Any]:
    return {
        "image": picture(i), "max_guidance_scale": 3.0 + i, "motion_bucket_id": 100 + 50 * i, "fps": 5 + 2 * i,
        "noise_aug_strength": 0.02 * (i + 1), "height": 32, "width": 32, "num_frames": 2,
    }  # fmt: skip


@case("StableVideoDiffusionPipeline", "Stable Video Diffusion", "image to video", _inputs)
def image_to_video() -> Any:
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
        cross_attention_dim=32, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=32
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", interpolation_type="linear", prediction_type="v_prediction", sigma_max=700.0,
        sigma_min=0.002, steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(
        unet=tiny.scaled(unet, 1.2), vae=tiny.scaled(vae, 1.0, 5), scheduler=scheduler,
        image_encoder=image_encoder(size=224), feature_extractor=image_processor(),
    )  # fmt: skip
