"""Stable Diffusion steered: ControlNet, T2I-Adapter, perturbed and self-attention guidance, panoramas."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance import parts_sd as parts
from conformance.case import case
from diffusers import (
    AutoencoderKL,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionSAGPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)

from steploom.weave.batching import unlike

FAMILY = "Stable Diffusion"


@case("StableDiffusionControlNetPipeline", FAMILY, "control", parts.pictured)
def controlnet() -> Any:
    components = parts.parts(UniPCMultistepScheduler(**parts.BETAS))
    return StableDiffusionControlNetPipeline(**components, controlnet=parts.controlnet())


def _two_pictures(i: int) -> dict[str, Any]:
    return parts.pictured(i) | {"control_image": parts.picture(10 + i)}


@case("StableDiffusionControlNetImg2ImgPipeline", FAMILY, "control", _two_pictures)
def controlnet_image_to_image() -> Any:
    components = parts.parts(UniPCMultistepScheduler(**parts.BETAS))
    return StableDiffusionControlNetImg2ImgPipeline(**components, controlnet=parts.controlnet())


@case("StableDiffusionAdapterPipeline", FAMILY, "control", parts.pictured)
def t2i_adapter() -> Any:
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    return StableDiffusionAdapterPipeline(**parts.parts(), adapter=tiny.scaled(adapter, 1.2, 7))


@case("StableDiffusionPAGPipeline", FAMILY, "text to image", parts.perturbed)
def perturbed_attention() -> Any:
    return StableDiffusionPAGPipeline(**parts.parts(), pag_applied_layers="mid")


def _grounded(i: int) -> dict[str, Any]:
    # In words that begin unlike: the tiny encoder looks at the first word alone.
    boxes = {"gligen_phrases": [("boat", "house", "one")[i]], "gligen_boxes": [[0.1, 0.1, 0.5 + 0.1 * i, 0.8]]}
    return parts.sized(i) | boxes | {"gligen_scheduled_sampling_beta": 1.0}


@case("StableDiffusionGLIGENPipeline", FAMILY, "control", _grounded)
def grounded() -> Any:
    """Its gates are opened: a new layer's are closed, and it looks at no box."""
    pipeline = StableDiffusionGLIGENPipeline(**parts.parts(parts.ddim(), attention_type="gated"))
    for name, gate in pipeline.unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            torch.nn.init.constant_(gate, 2.0)
    return pipeline


def _self_attended(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"sag_scale": 0.5 + 0.25 * i}


@case(
    "StableDiffusionSAGPipeline", FAMILY, "text to image", _self_attended,
    alone=f"{unlike.UNLIKE}: the module has processors",
)  # fmt: skip
def self_attention_guidance() -> Any:
    return StableDiffusionSAGPipeline(**parts.parts(parts.ddim(), attention_head_dim=4))


def _wide(i: int) -> dict[str, Any]:
    return parts.text(i) | {"height": 16, "width": 576}


@case("StableDiffusionPanoramaPipeline", FAMILY, "text to image", _wide)
def panorama() -> Any:
    """Two views, of the 64 latents that the class has hard-coded for a VAE of factor 8."""
    levels = 4
    autoencoder = AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    return StableDiffusionPanoramaPipeline(**parts.parts(parts.ddim()) | {"vae": tiny.scaled(autoencoder)})
