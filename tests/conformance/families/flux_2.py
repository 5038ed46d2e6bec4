"""FLUX.2: text from a language model's inner layers, pictures as reference tokens."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_flux import chat_tokenizer, picture, qwen3
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

FAMILY = "FLUX.2"


def _inputs(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 2.0 + 2 * i, "height": 64, "width": 64, "max_sequence_length": 32,
        "text_encoder_out_layers": (0, 1, 2),
    }  # fmt: skip


def _editing(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i, 64)}


def _mistral() -> Any:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 128,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        image_token_index=259,
    )  # fmt: skip
    return tiny.scaled(Mistral3ForConditionalGeneration(config), 1.5, 4)


def _parts(*, guidance: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
    )
    return {
        "transformer": tiny.scaled(transformer, 1.5), "vae": tiny.scaled(vae, 1.0, 5),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }  # fmt: skip


def _dev() -> Any:
    tokenizer = tiny.tokenizer(64)
    tokenizer.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    return Flux2Pipeline(**_parts(guidance=True), text_encoder=_mistral(), tokenizer=tokenizer)


def _klein() -> Any:
    return Flux2KleinPipeline(**_parts(guidance=False), text_encoder=qwen3(), tokenizer=chat_tokenizer())


@case("Flux2Pipeline", FAMILY, "text to image", _inputs)
def text_to_image() -> Any:
    return _dev()


@case("Flux2Pipeline", FAMILY, "editing", _editing, variant="image")
def editing() -> Any:
    return _dev()


@case("Flux2KleinPipeline", FAMILY, "text to image", _inputs)
def klein() -> Any:
    return _klein()


@case("Flux2KleinPipeline", FAMILY, "editing", _editing, variant="image")
def klein_editing() -> Any:
    return _klein()


def _cached_editing(i: int) -> dict[str, Any]:
    return {name: value for name, value in _editing(i).items() if name != "guidance_scale"}


@case(
    "Flux2KleinKVPipeline", FAMILY, "editing", _cached_editing,
)  # fmt: skip
def klein_cached_editing() -> Any:
    return Flux2KleinKVPipeline(**_parts(guidance=False), text_encoder=qwen3(), tokenizer=chat_tokenizer())
