"""Ideogram 4: a packed sequence of text and image, a second transformer for the unconditional branch."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import chat_tokenizer, qwen3_vl, vae_flux2
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

_LAYERS = 36
"""Of the text encoder: the pipeline takes the hidden states of 13 fixed layers."""


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "guidance_schedule": None, "height": 32, "width": 32,
        "max_sequence_length": 16,
    }  # fmt: skip


def _transformer(seed: int) -> Any:
    return tiny.scaled(
        Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=64,
            adaln_dim=16, llm_features_dim=13 * 32, mrope_section=(4, 2, 2),
        ), 1.5, seed,
    )  # fmt: skip


@case("Ideogram4Pipeline", "Ideogram 4", "text to image", _inputs)
def text_to_image() -> Any:
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae_flux2(), text_encoder=qwen3_vl(layers=_LAYERS),
        tokenizer=chat_tokenizer(), transformer=_transformer(0), unconditional_transformer=_transformer(1),
    )  # fmt: skip
