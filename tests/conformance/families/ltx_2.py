"""LTX-2: video and sound in one transformer, with guidance by text, by skipped attention and by modality."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

_LAYERS = 2


def _text(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "audio_guidance_scale": 5.0 + i,
        "spatio_temporal_guidance_blocks": [0], "height": 32, "width": 32, "num_frames": 5,
        "max_sequence_length": 16,
    }  # fmt: skip


def _image(i: int) -> dict[str, Any]:
    return {**_text(i), "image": parts.picture(i), "image_crf": 0}


def _gemma() -> Any:
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": _LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": tiny.VOCABULARY, "sliding_window": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=258)
    return tiny.scaled(Gemma3ForConditionalGeneration(config), 1.5, 3)


def _transformer() -> Any:
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
        rope_type="split", perturbed_attn=True,
    )  # fmt: skip
    return tiny.scaled(transformer, 1.5)


def _connectors() -> Any:
    heads = {
        f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in
        (("num_attention_heads", 2), ("attention_head_dim", 8), ("num_layers", 1), ("num_learnable_registers", None))
    }  # fmt: skip
    return tiny.scaled(
        LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=_LAYERS + 1, connector_rope_base_seq_len=32,
            rope_double_precision=False, rope_type="split", **heads,
        ), 1.5, 4,
    )  # fmt: skip


def _vae() -> Any:
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_type=("spatiotemporal",), upsample_factor=(1,), patch_size=1,
    )  # fmt: skip
    return tiny.scaled(vae, 1.0, 5)


def _parts() -> dict[str, Any]:
    sound = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return {
        "transformer": _transformer(), "vae": _vae(), "audio_vae": tiny.scaled(sound, 1.0, 6), "vocoder": vocoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder": _gemma(), "tokenizer": tiny.tokenizer(16),
        "connectors": _connectors(),
    }  # fmt: skip


@case("LTX2Pipeline", "LTX-2", "text to video", _text, steps=(2, 3, 4))
def text_to_video() -> Any:
    return LTX2Pipeline(**_parts())


@case("LTX2ImageToVideoPipeline", "LTX-2", "image to video", _image, steps=(2, 3, 4))
def image_to_video() -> Any:
    return LTX2ImageToVideoPipeline(**_parts())
