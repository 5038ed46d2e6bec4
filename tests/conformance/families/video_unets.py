"""Text-to-video of the ModelScope line: three-dimensional U-Nets."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, case
from conformance.parts_cascade import ddim, image_encoder, image_processor
from conformance.pictures import picture
from diffusers import I2VGenXLPipeline, TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "norm_num_groups": 4,
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 32, "attention_head_dim": 4,
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 32, "width": 32, "num_frames": 2}


def _from_image(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i), "target_fps": 8 + 4 * i, "clip_skip": None}


def _parts() -> dict[str, Any]:
    return {
        "scheduler": ddim(), "vae": tiny.vae(), "text_encoder": tiny.clip(projected=False),
        "tokenizer": tiny.tokenizer(),
    }  # fmt: skip


@case("TextToVideoSDPipeline", "ModelScope text-to-video", "text to video", _inputs)
def text_to_video() -> Any:
    return TextToVideoSDPipeline(unet=tiny.scaled(UNet3DConditionModel(**UNET), 1.2), **_parts())


@case("I2VGenXLPipeline", "I2VGen-XL", "image to video", _from_image)
def image_to_video() -> Any:
    unet = I2VGenXLUNet(**UNET)
    parts = _parts()
    # This pipeline samples the image's latents from torch's global generator: the posterior must have no width.
    torch.nn.init.constant_(parts["vae"].quant_conv.bias[parts["vae"].config.latent_channels :], -1e3)
    return I2VGenXLPipeline(
        unet=tiny.scaled(unet, 1.2), image_encoder=image_encoder(), feature_extractor=image_processor(), **parts
    )
