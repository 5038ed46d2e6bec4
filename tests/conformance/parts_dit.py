"""Parts that several text-to-image families share: language models as text encoders, autoencoders, pictures."""

from __future__ import annotations

from typing import Any

import tiny
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3Model,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

LONG = ("a red circle on a blue square", "two boats", "old house by the sea")
"""Prompts whose lengths still differ after padding to a multiple of 8 or 16."""


def vae8(channels: int = 4, **extra: Any) -> Any:
    """An autoencoder of spatial factor 8."""
    return tiny.scaled(
        AutoencoderKL(
            block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4,
            layers_per_block=1, sample_size=32, **extra,
        ), 1.0, 5,
    )  # fmt: skip


def vae_dc(channels: int = 4) -> Any:
    """A deep-compression autoencoder of spatial factor 4."""
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return tiny.scaled(
        AutoencoderDC(
            latent_channels=channels, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
            upsample_block_type="interpolate", downsample_block_type="stride_conv", decoder_act_fns="silu",
            decoder_norm_types="rms_norm", scaling_factor=0.41,
        ), 1.0, 5,
    )  # fmt: skip


_LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def gemma() -> Any:
    return tiny.scaled(GemmaModel(GemmaConfig(**_LANGUAGE)), 1.5, 4)


def gemma2() -> Any:
    return tiny.scaled(Gemma2Model(Gemma2Config(**_LANGUAGE, query_pre_attn_scalar=8)), 1.5, 4)


def glm() -> Any:
    return tiny.scaled(GlmModel(GlmConfig(**_LANGUAGE)), 1.5, 4)


def llama() -> Any:
    """Two layers; attention in plain code, since its weights are asked for."""
    return tiny.scaled(LlamaForCausalLM(LlamaConfig(**_LANGUAGE, attn_implementation="eager")), 1.5, 4)


def mistral3() -> Any:
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = {"model_type": "ministral3", **_LANGUAGE}
    return tiny.scaled(Mistral3Model(Mistral3Config(text_config=text, vision_config=vision)), 1.5, 4)


SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_VOCABULARY = tiny.VOCABULARY + 8
_TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)


def chat_tokenizer(length: int = 64) -> Any:
    """A byte-level tokenizer with the marks of a chat; its template is the bare text."""
    tokenizer = tiny.tokenizer(length)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def qwen3_vl(kind: Any = Qwen3VLModel, layers: int = 2) -> Any:
    tokens = chat_tokenizer().convert_tokens_to_ids(list(SPECIAL))
    config = Qwen3VLConfig(
        text_config=_LANGUAGE | {
            "vocab_size": CHAT_VOCABULARY, "num_hidden_layers": layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=tokens[2], vision_end_token_id=tokens[3], image_token_id=tokens[4],
        video_token_id=tokens[5],
    )  # fmt: skip
    return tiny.scaled(kind(config), 1.5, 4)


def qwen3_vl_generating() -> Any:
    return qwen3_vl(Qwen3VLForConditionalGeneration)


class _Processor(Qwen3VLProcessor):
    """Without videos: their processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        _, _, self.vision_start_token, self.vision_end_token, self.image_token, self.video_token = SPECIAL
        _, _, self.vision_start_token_id, self.vision_end_token_id, self.image_token_id, self.video_token_id = (
            tokenizer.convert_tokens_to_ids(list(SPECIAL))
        )


def qwen3_vl_processor(length: int = 64) -> Any:
    """Shows the model at most 32 x 32 pixels of a picture."""
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    tokenizer = chat_tokenizer(length)
    return _Processor(Qwen2VLImageProcessorPil(size=pixels, patch_size=8), tokenizer, _TEMPLATE)


def vae_qwen() -> Any:
    return tiny.scaled(
        AutoencoderKLQwenImage(
            base_dim=12, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )
    )  # fmt: skip


def vae_flux2() -> Any:
    return tiny.scaled(
        AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
            sample_size=32,
        ), 1.0, 5,
    )  # fmt: skip
