"""Lumina-Next and Lumina Image 2.0: next-DiT with Gemma text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import LONG, gemma, gemma2
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 64}


def _two(i: int) -> dict[str, Any]:
    return _inputs(i) | {"system_prompt": "Draw:"}


def _next(i: int) -> dict[str, Any]:
    return _inputs(i) | {"clean_caption": False}


def _ragged(i: int) -> dict[str, Any]:
    return _next(i) | {"prompt": LONG[i]}


def _parts() -> dict[str, Any]:
    return {"vae": tiny.vae(), "tokenizer": tiny.tokenizer(64), "scheduler": FlowMatchEulerDiscreteScheduler()}


def _lumina_next() -> Any:
    transformer = LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    return LuminaPipeline(**_parts(), transformer=tiny.scaled(transformer, 1.5), text_encoder=gemma())


@case("LuminaPipeline", "Lumina-Next", "text to image", _next)
def lumina_next() -> Any:
    return _lumina_next()


@case("LuminaPipeline", "Lumina-Next", "text to image", _ragged, variant="ragged")
def lumina_next_ragged() -> Any:
    return _lumina_next()


@case("Lumina2Pipeline", "Lumina Image 2.0", "text to image", _two)
def lumina2() -> Any:
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    return Lumina2Pipeline(**_parts(), transformer=tiny.scaled(transformer, 1.5), text_encoder=gemma2())
