"""Sana: linear attention over a deep-compression autoencoder, Gemma 2 text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import gemma2, vae_dc
from conformance.pictures import picture
from diffusers import (
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 16,
        "use_resolution_binning": False, "complex_human_instruction": None,
    }  # fmt: skip


def _instructed(i: int) -> dict[str, Any]:
    return _inputs(i) | {"complex_human_instruction": ["Draw: "]}


def _perturbed(i: int) -> dict[str, Any]:
    return _inputs(i) | {"pag_scale": 2.0 + i}


def _controlled(i: int) -> dict[str, Any]:
    return _inputs(i) | {"control_image": picture(i), "controlnet_conditioning_scale": 1.0}


def _sprint(i: int) -> dict[str, Any]:
    return _inputs(i) | {"intermediate_timesteps": None}


def _redrawn(i: int) -> dict[str, Any]:
    return _sprint(i) | {"image": picture(i), "strength": 0.5}


_SIZES: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8,
    "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 32,
    "sample_size": 32,
}  # fmt: skip


def _parts(**extra: Any) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(num_layers=2, **_SIZES, **extra)
    return {
        "tokenizer": tiny.tokenizer(64), "text_encoder": gemma2(), "vae": vae_dc(),
        "transformer": tiny.scaled(transformer, 1.5),
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }  # fmt: skip


def _sprint_parts() -> dict[str, Any]:
    extra = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return _parts(**extra) | {"scheduler": SCMScheduler()}


@case("SanaPipeline", "Sana", "text to image", _inputs)
def text_to_image() -> Any:
    return SanaPipeline(**_parts())


@case("SanaPipeline", "Sana", "text to image", _instructed, variant="instructed")
def instructed() -> Any:
    return SanaPipeline(**_parts())


@case("SanaPAGPipeline", "Sana", "text to image", _perturbed)
def perturbed() -> Any:
    return SanaPAGPipeline(**_parts(), pag_applied_layers="transformer_blocks.0")


@case("SanaControlNetPipeline", "Sana", "control", _controlled)
def controlled() -> Any:
    net = tiny.scaled(SanaControlNetModel(num_layers=1, **_SIZES), 1.5, 7)
    return SanaControlNetPipeline(**_parts(), controlnet=net)


@case("SanaSprintPipeline", "Sana-Sprint", "text to image", _sprint, steps=(2, 3, 4))
def sprint() -> Any:
    return SanaSprintPipeline(**_sprint_parts())


@case("SanaSprintImg2ImgPipeline", "Sana-Sprint", "image to image", _redrawn, steps=(4, 6, 8))
def redrawn() -> Any:
    return SanaSprintImg2ImgPipeline(**_sprint_parts())
