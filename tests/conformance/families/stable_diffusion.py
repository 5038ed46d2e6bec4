"""Stable Diffusion 1 and 2: a UNet with cross-attention, and the pipelines that its weights were published for."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_sd as parts
from conformance.case import case
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

FAMILY = "Stable Diffusion"


@case("StableDiffusionPipeline", FAMILY, "text to image", parts.sized)
def text_to_image() -> Any:
    return StableDiffusionPipeline(**parts.parts())


@case("StableDiffusionPipeline", FAMILY, "text to image", parts.sized, variant="euler")
def text_to_image_euler() -> Any:
    return StableDiffusionPipeline(**parts.parts(EulerDiscreteScheduler(**parts.BETAS, steps_offset=1)))


def _with_picture_prompt(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"ip_adapter_image": parts.picture(i)}


@case("StableDiffusionPipeline", FAMILY, "text to image", _with_picture_prompt, variant="ip-adapter")
def text_to_image_ip_adapter() -> Any:
    components = parts.parts(parts.ddim()) | {
        "image_encoder": parts.vision(),
        "feature_extractor": parts.image_processor(),
    }
    pipeline = StableDiffusionPipeline(**components)
    pipeline.load_ip_adapter(parts.ip_adapter(pipeline.unet), subfolder="", weight_name="", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.8)
    return pipeline


@case("StableDiffusionImg2ImgPipeline", FAMILY, "image to image", parts.pictured)
def image_to_image() -> Any:
    return StableDiffusionImg2ImgPipeline(**parts.parts())


def _painted(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"image": parts.picture(i), "mask_image": parts.mask(i)}


@case("StableDiffusionInpaintPipeline", FAMILY, "inpainting", _painted)
def inpainting() -> Any:
    return StableDiffusionInpaintPipeline(**parts.parts(parts.ddim(), in_channels=9))


@case("StableDiffusionInpaintPipeline", FAMILY, "inpainting", _painted, variant="text-to-image-unet")
def inpainting_plain_unet() -> Any:
    return StableDiffusionInpaintPipeline(**parts.parts())


def _edited(i: int) -> dict[str, Any]:
    return parts.pictured(i) | {"image_guidance_scale": 1.5 + 0.5 * i}


@case("StableDiffusionInstructPix2PixPipeline", FAMILY, "editing", _edited)
def instruct_pix2pix() -> Any:
    scheduler = EulerAncestralDiscreteScheduler(**parts.BETAS, steps_offset=1)
    return StableDiffusionInstructPix2PixPipeline(**parts.parts(scheduler, in_channels=8))


def _upscaled(i: int) -> dict[str, Any]:
    return parts.text(i) | {"image": parts.picture(i, 16), "noise_level": 20 + 10 * i}


@case("StableDiffusionUpscalePipeline", FAMILY, "upscaling", _upscaled)
def upscaling() -> Any:
    components = parts.parts(
        DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        checked=False, in_channels=7, num_class_embeds=400,
    )  # fmt: skip
    return StableDiffusionUpscalePipeline(
        **components, low_res_scheduler=DDPMScheduler(**parts.BETAS), max_noise_level=350
    )


@case("StableDiffusionLatentUpscalePipeline", FAMILY, "upscaling", parts.pictured)
def latent_upscaling() -> Any:
    scheduler = EulerDiscreteScheduler(**parts.BETAS, prediction_type="sample")
    components = parts.parts(
        scheduler, checked=False, act_fn="gelu", block_out_channels=(32, 32), layers_per_block=2, time_embedding_dim=32,
        in_channels=8, out_channels=5, norm_num_groups=None,
        attention_head_dim=8, time_cond_proj_dim=128 + 32, conv_in_kernel=1, conv_out_kernel=1, mid_block_type=None,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"), only_cross_attention=False,
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"), resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier", timestep_post_act="gelu",
    )  # fmt: skip
    return StableDiffusionLatentUpscalePipeline(**components)


def _depth_estimator() -> Any:
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
        readout_type="project",
    )  # fmt: skip
    return tiny.scaled(DPTForDepthEstimation(config), 1.5, 13)


@case("StableDiffusionDepth2ImgPipeline", FAMILY, "image to image", parts.pictured)
def depth_to_image() -> Any:
    return StableDiffusionDepth2ImgPipeline(
        **parts.parts(DPMSolverMultistepScheduler(**parts.BETAS), checked=False, in_channels=5),
        depth_estimator=_depth_estimator(),
        feature_extractor=DPTImageProcessor(size={"height": 32, "width": 32}),
    )


def _varied(i: int) -> dict[str, Any]:
    guidance = parts.sized(i)
    del guidance["prompt"]
    return guidance | {"image": parts.picture(i)}


@case("StableDiffusionImageVariationPipeline", FAMILY, "image to image", _varied)
def image_variation() -> Any:
    components = parts.parts() | {"feature_extractor": parts.image_processor(), "image_encoder": parts.vision()}
    del components["text_encoder"], components["tokenizer"]
    return StableDiffusionImageVariationPipeline(**components)
