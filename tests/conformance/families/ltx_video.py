"""LTX-Video: text, image and conditions to video, with a timestep per token where frames are given."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)


def _text(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "guidance_rescale": 0.2 + 0.1 * i,
        "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16,
    }  # fmt: skip


def _image(i: int) -> dict[str, Any]:
    return {**_text(i), "image": parts.picture(i)}


def _parts() -> dict[str, Any]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )  # fmt: skip
    return {
        "transformer": tiny.scaled(transformer, 1.5), "vae": tiny.scaled(vae), "text_encoder": tiny.t5(32),
        "tokenizer": tiny.tokenizer(16), "scheduler": FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip


@case("LTXPipeline", "LTX-Video", "text to video", _text)
def text_to_video() -> Any:
    return LTXPipeline(**_parts())


@case("LTXImageToVideoPipeline", "LTX-Video", "image to video", _image)
def image_to_video() -> Any:
    return LTXImageToVideoPipeline(**_parts())


@case("LTXConditionPipeline", "LTX-Video", "image to video", _image)
def condition() -> Any:
    return LTXConditionPipeline(**_parts())
