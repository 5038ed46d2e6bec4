"""aMUSEd: masked image tokens, unmasked over a few steps."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_cascade import movq
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 16, "width": 16}


@case("AmusedPipeline", "aMUSEd", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = UVit2DModel(
        hidden_size=32, cond_embed_dim=32, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
        encoder_hidden_size=32, vocab_size=32, codebook_size=24, in_channels=32, block_out_channels=32,
        num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        sample_size=8, ln_elementwise_affine=False,
    )  # fmt: skip
    return AmusedPipeline(
        transformer=tiny.scaled(transformer, 1.5), vqvae=movq(lookup_from_codebook=True, num_vq_embeddings=24),
        scheduler=AmusedScheduler(mask_token_id=31),
        text_encoder=tiny.clip(), tokenizer=tiny.tokenizer(),
    )  # fmt: skip
