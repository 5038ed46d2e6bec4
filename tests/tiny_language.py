"""Tiny diffusion language models with random weights, whose text depends on prompt and seed."""

from __future__ import annotations

from typing import Any

import tiny
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from transformers import BertConfig, BertForMaskedLM, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer() -> Any:
    made = tiny.tokenizer(64)
    made.add_special_tokens({"mask_token": "<mask>"})
    made.chat_template = _TEMPLATE
    return made


def llada() -> Any:
    """LLaDA 2 itself is code from the hub; this is a masked language model of the same interface."""
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LLaDA2Pipeline(tiny.scaled(BertForMaskedLM(config), 3.0), BlockRefinementScheduler(), tokenizer())


def gemma(scheduler: Any = None, **text_config: Any) -> Any:
    text = {
        "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
        "num_global_key_value_heads": 2, "sliding_window": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
        "layer_types": ["sliding_attention", "full_attention"], **text_config,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 8,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    model = tiny.scaled(DiffusionGemmaForBlockDiffusion(config), 2.0)
    return DiffusionGemmaPipeline(model, scheduler or BlockRefinementScheduler(), tokenizer())
