"""PRX: text enters as embeddings here, since the text cleaner needs a package of its own (ftfy)."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import case
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
from transformers import T5GemmaConfig, T5GemmaEncoder

_LENGTHS = (14, 11, 9)


def _inputs(i: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(i)
    mask = (torch.arange(16) < _LENGTHS[i])[None]
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=noise), "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.zeros(1, 16, 32), "negative_prompt_attention_mask": torch.arange(16)[None] < 2,
        "guidance_scale": 3.0 + i, "height": 32, "width": 32, "use_resolution_binning": False,
    }  # fmt: skip


@case("PRXPipeline", "PRX", "text to image", _inputs)
def text_to_image() -> Any:
    transformer = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": tiny.VOCABULARY,
    }  # fmt: skip
    text = T5GemmaEncoder(T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=tiny.VOCABULARY).encoder)
    return PRXPipeline(
        transformer=tiny.scaled(transformer, 1.5), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=tiny.scaled(text, 1.5), tokenizer=tiny.tokenizer(), vae=tiny.vae(),
    )  # fmt: skip
