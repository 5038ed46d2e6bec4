"""Stable Audio: a transformer over latents of sound."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

CHANNELS = 4


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "audio_end_in_s": 2.0 + i}


@case("StableAudioPipeline", "Stable Audio", "text to audio", _inputs)
def text_to_audio() -> Any:
    transformer = StableAudioDiTModel(
        sample_size=12, in_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=CHANNELS, cross_attention_dim=32, time_proj_dim=16,
        global_states_input_dim=64, cross_attention_input_dim=32,
    )  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[1, 2], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=CHANNELS, sampling_rate=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32)
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return StableAudioPipeline(
        transformer=tiny.scaled(transformer, 1.2), vae=tiny.scaled(vae, 1.0, 5), scheduler=scheduler,
        projection_model=tiny.scaled(projection, 1.2), text_encoder=tiny.t5(), tokenizer=tiny.tokenizer(),
    )  # fmt: skip
