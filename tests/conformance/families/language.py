"""Diffusion language models: LLaDA 2 and DiffusionGemma refine a block of tokens at a time."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)
from transformers import BertConfig, BertForMaskedLM, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
_GREEDY = ("seed",)
"""Without temperature nothing is drawn at random."""


_PREFIX = "not yet: prefixes of different lengths are not padded"
_CACHE = "not yet: each request brings its own key-value cache as an object"


def _llada(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "gen_length": (16, 24, 12)[i], "block_length": 8, "output_type": "text"}


def _llada_sampled(i: int) -> dict[str, Any]:
    return _llada(i) | {"temperature": 1.0, "threshold": 0.3, "editing_threshold": 0.4, "max_post_steps": 2}


def _gemma(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "gen_length": (16, 16, 8)[i], "output_type": "text"}


def _gemma_sampled(i: int) -> dict[str, Any]:
    return _gemma(i) | {"temperature": 1.0}


def _tokenizer() -> Any:
    tokenizer = tiny.tokenizer(64)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _llada_pipeline() -> Any:
    """LLaDA 2 itself is code from the hub; this is a masked language model of the same interface."""
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LLaDA2Pipeline(tiny.scaled(BertForMaskedLM(config), 3.0), BlockRefinementScheduler(), _tokenizer())


@case("LLaDA2Pipeline", "LLaDA 2", "text", _llada, indifferent=_GREEDY, alone=_PREFIX)
def llada() -> Any:
    return _llada_pipeline()


@case("LLaDA2Pipeline", "LLaDA 2", "text", _llada_sampled, variant="sampled", alone=_PREFIX)
def llada_sampled() -> Any:
    return _llada_pipeline()


def _diffusion_gemma(scheduler: Any) -> Any:
    text = {
        "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
        "num_global_key_value_heads": 2, "sliding_window": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 8,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    return DiffusionGemmaPipeline(tiny.scaled(DiffusionGemmaForBlockDiffusion(config), 2.0), scheduler, _tokenizer())


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma, alone=_CACHE)
def gemma() -> Any:
    return _diffusion_gemma(BlockRefinementScheduler())


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma_sampled, variant="sampled", alone=_CACHE)
def gemma_sampled() -> Any:
    return _diffusion_gemma(DiscreteDDIMScheduler())


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma, variant="entropy", alone=_CACHE)
def gemma_entropy() -> Any:
    return _diffusion_gemma(EntropyBoundScheduler())
