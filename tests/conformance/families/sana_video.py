"""SANA-Video: linear attention over video tokens, with masked Gemma text."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel
from transformers import Gemma2Config, Gemma2Model


def _text(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 32, "width": 32,
        "frames": 5, "max_sequence_length": 16, "complex_human_instruction": [], "use_resolution_binning": False,
    }  # fmt: skip


@case("SanaVideoPipeline", "SANA-Video", "text to video", _text)
def text_to_video() -> Any:
    config = Gemma2Config(
        head_dim=8, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=1, vocab_size=tiny.VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaVideoPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), tokenizer=tiny.tokenizer(16),
        text_encoder=tiny.scaled(Gemma2Model(config), 1.5, 3), scheduler=scheduler,
    )  # fmt: skip
