"""Hunyuan-DiT: BERT and T5 text, style and size embeddings."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_dit import vae8
from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPAGPipeline, HunyuanDiTPipeline
from transformers import BertConfig, BertModel


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 1.5 + 0.5 * i, "height": 32, "width": 32,
        "use_resolution_binning": False,
    }  # fmt: skip


def _perturbed(i: int) -> dict[str, Any]:
    return _inputs(i) | {"pag_scale": 0.5 + 0.5 * i}


def _parts() -> dict[str, Any]:
    transformer = HunyuanDiT2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
    )  # fmt: skip
    bert = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=tiny.VOCABULARY,
        pad_token_id=0,
    )  # fmt: skip
    return {
        "vae": vae8(), "text_encoder": tiny.scaled(BertModel(bert), 1.5, 1), "tokenizer": tiny.tokenizer(77),
        "text_encoder_2": tiny.t5(32), "tokenizer_2": tiny.tokenizer(256),
        "transformer": tiny.scaled(transformer, 1.5), "scheduler": DDPMScheduler(), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


@case("HunyuanDiTPipeline", "Hunyuan-DiT", "text to image", _inputs, steps=(2, 3, 4))
def text_to_image() -> Any:
    return HunyuanDiTPipeline(**_parts())


@case("HunyuanDiTPAGPipeline", "Hunyuan-DiT", "text to image", _perturbed, steps=(2, 3, 4))
def perturbed() -> Any:
    return HunyuanDiTPAGPipeline(**_parts(), pag_applied_layers="blocks.1")
