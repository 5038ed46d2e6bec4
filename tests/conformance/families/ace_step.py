"""ACE-Step: music from a description and lyrics."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import NO_MASK
from conformance.parts_cascade import EQUAL_LENGTHS
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

CHANNELS = 8
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "lyrics": "la " * (i + 1), "guidance_scale": 4.0 + i, "audio_duration": 4.0}


def _equal_inputs(i: int) -> dict[str, Any]:
    return {**_inputs(i), "prompt": EQUAL_LENGTHS[i], "lyrics": ("la", "do", "mi")[i]}


def _pipeline() -> Any:
    transformer = AceStepTransformer1DModel(
        **SIZES, num_hidden_layers=2, in_channels=3 * CHANNELS, audio_acoustic_hidden_dim=CHANNELS, sliding_window=4
    )
    conditions = AceStepConditionEncoder(
        **SIZES, text_hidden_dim=32, timbre_hidden_dim=CHANNELS, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, sliding_window=4,
    )  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[1, 2], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=CHANNELS, sampling_rate=8,
    )  # fmt: skip
    text = Qwen3Config(**SIZES, num_hidden_layers=2, vocab_size=tiny.VOCABULARY)
    conditions = tiny.scaled(conditions, 1.2)
    conditions.silence_latent = torch.randn(1, 120, CHANNELS, generator=torch.Generator().manual_seed(9))
    return AceStepPipeline(
        transformer=tiny.scaled(transformer, 1.2), condition_encoder=conditions, vae=tiny.scaled(vae, 1.0, 5),
        text_encoder=tiny.scaled(Qwen3Model(text), 1.2, 3), tokenizer=tiny.tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )  # fmt: skip


@case("AceStepPipeline", "ACE-Step", "text to audio", _inputs, alone=SIZED, because=NO_MASK)
def text_to_audio() -> Any:
    return _pipeline()


@case("AceStepPipeline", "ACE-Step", "text to audio", _equal_inputs, variant="equal lengths")
def equal_lengths() -> Any:
    return _pipeline()
