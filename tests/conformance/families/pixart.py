"""PixArt: cross-attention to T5 text under adaptive layer norms; learned sigmas."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import vae8
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 64, "width": 64, "max_sequence_length": 16,
        "use_resolution_binning": False, "clean_caption": False,
    }  # fmt: skip


def _perturbed(i: int) -> dict[str, Any]:
    return _inputs(i) | {"guidance_scale": 1.5 + 0.25 * i, "pag_scale": 0.5 + 0.25 * i}


def _parts(*, sized: bool = False) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=32, sample_size=128 if sized else 8, patch_size=2,
        use_additional_conditions=sized,
    )  # fmt: skip
    return {
        "tokenizer": tiny.tokenizer(), "text_encoder": tiny.t5(32), "vae": vae8(),
        "transformer": tiny.scaled(transformer, 1.5), "scheduler": DPMSolverMultistepScheduler(),
    }  # fmt: skip


@case("PixArtAlphaPipeline", "PixArt-alpha", "text to image", _inputs)
def alpha() -> Any:
    return PixArtAlphaPipeline(**_parts(sized=False))


@case("PixArtAlphaPipeline", "PixArt-alpha", "text to image", _inputs, variant="sized")
def alpha_sized() -> Any:
    """With resolution and aspect ratio as conditions, which the published 1024 px weights have."""
    return PixArtAlphaPipeline(**_parts(sized=True))


@case("PixArtSigmaPipeline", "PixArt-Sigma", "text to image", _inputs)
def sigma() -> Any:
    return PixArtSigmaPipeline(**_parts())


@case("PixArtSigmaPAGPipeline", "PixArt-Sigma", "text to image", _perturbed, steps=(2, 3, 4))
def perturbed() -> Any:
    return PixArtSigmaPAGPipeline(**_parts() | {"scheduler": DDIMScheduler()})
