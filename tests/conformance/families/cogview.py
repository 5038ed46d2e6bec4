"""CogView3-Plus and CogView4: text and image tokens in one sequence, sizes as conditions."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import LEAKS
from conformance.parts_dit import LONG, glm
from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

_SIZES: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4, "pos_embed_max_size": 32,
    "sample_size": 16,
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32, "max_sequence_length": 16}


def _ragged(i: int) -> dict[str, Any]:
    return _inputs(i) | {"prompt": LONG[i], "max_sequence_length": 64}


@case("CogView3PlusPipeline", "CogView3-Plus", "text to image", _inputs)
def cogview3() -> Any:
    return CogView3PlusPipeline(
        tokenizer=tiny.tokenizer(), text_encoder=tiny.t5(32), vae=tiny.vae(),
        transformer=tiny.scaled(CogView3PlusTransformer2DModel(**_SIZES), 1.5), scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


def _cogview4() -> Any:
    return CogView4Pipeline(
        tokenizer=tiny.tokenizer(64), text_encoder=glm(), vae=tiny.vae(),
        transformer=tiny.scaled(CogView4Transformer2DModel(**_SIZES, rope_axes_dim=(4, 4)), 1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )  # fmt: skip


@case("CogView4Pipeline", "CogView4", "text to image", _inputs)
def cogview4() -> Any:
    return _cogview4()


@case("CogView4Pipeline", "CogView4", "text to image", _ragged, variant="ragged", alone=SIZED, because=LEAKS)
def cogview4_ragged() -> Any:
    return _cogview4()
