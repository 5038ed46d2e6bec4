"""GLM-Image: draws from tokens that a language model wrote, given here, and from glyphs quoted in the prompt."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import SIZED, case
from conformance.claims import LEAKS
from conformance.parts_dit import vae8
from conformance.pictures import picture
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel

_CODES = 64
_EQUALLY_LONG = ('a "red" sign', 'two "big" ones', '"old" house')
_GLYPHS = ('a sign "redder"', 'two "big" boats', '"old" house')


def _inputs(i: int) -> dict[str, Any]:
    tokens = torch.randint(0, _CODES, (1, 16), generator=torch.Generator().manual_seed(i))
    return {
        "prompt": _EQUALLY_LONG[i], "guidance_scale": 2.0 + i, "height": 64, "width": 64, "prior_token_ids": tokens,
    }  # fmt: skip


def _ragged(i: int) -> dict[str, Any]:
    return _inputs(i) | {"prompt": _GLYPHS[i]}


def _editing(i: int) -> dict[str, Any]:
    """The tokens that its language model would make of the picture, beside those of what is to be drawn."""
    tokens = torch.randint(0, _CODES, (16,), generator=torch.Generator().manual_seed(10 + i))
    grid = torch.tensor([[1, 4, 4]])
    return _inputs(i) | {
        "image": [picture(i, 64)], "prior_token_image_ids": [tokens], "source_image_grid_thw": [grid],
    }  # fmt: skip


def _pipeline() -> Any:
    transformer = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=_CODES,
    )  # fmt: skip
    return GlmImagePipeline(
        tokenizer=tiny.tokenizer(), processor=None, text_encoder=tiny.t5(32), vision_language_encoder=None,
        vae=vae8(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), transformer=tiny.scaled(transformer, 1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )  # fmt: skip


@case("GlmImagePipeline", "GLM-Image", "text to image", _inputs)
def text_to_image() -> Any:
    return _pipeline()


@case("GlmImagePipeline", "GLM-Image", "text to image", _ragged, variant="ragged", alone=SIZED, because=LEAKS)
def ragged() -> Any:
    return _pipeline()


@case("GlmImagePipeline", "GLM-Image", "editing", _editing, variant="image", steps=(8, 9, 10))
def editing() -> Any:
    return _pipeline()
