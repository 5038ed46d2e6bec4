"""ERNIE-Image: ragged Ministral text with lengths instead of a mask."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import mistral3, vae_flux2
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32}


@case("ErnieImagePipeline", "ERNIE-Image", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return ErnieImagePipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=vae_flux2(), text_encoder=mistral3(),
        tokenizer=tiny.tokenizer(64), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
