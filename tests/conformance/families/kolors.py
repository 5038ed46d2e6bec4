"""Kolors: the UNet of Stable Diffusion XL, with ChatGLM as its text encoder."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance import parts_sd as parts
from conformance.case import case
from diffusers import EulerDiscreteScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from transformers import PreTrainedTokenizerFast

FAMILY = "Kolors"


class _GlmTokenizer(PreTrainedTokenizerFast):
    """Pads on the left and gives positions, as ChatGLM's own does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        found["position_ids"] = (torch.cumsum(found["attention_mask"], 1) - 1).clamp(min=0)
        return found


def _tokenizer() -> Any:
    inner = tiny.tokenizer()._tokenizer
    return _GlmTokenizer(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def _chatglm() -> Any:
    config = ChatGLMConfig(
        num_layers=3, padded_vocab_size=tiny.VOCABULARY, hidden_size=32, ffn_hidden_size=64, kv_channels=8,
        num_attention_heads=4, seq_length=256, multi_query_attention=True, multi_query_group_num=2,
        add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    model = ChatGLMModel(config)
    with torch.no_grad():  # its constructor leaves memory as it finds it
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return tiny.scaled(model, 1.5, 3)


def _components() -> dict[str, Any]:
    unet = parts.unet_xl(cross_attention_dim=32, encoder_hid_dim=32, encoder_hid_dim_type="text_proj")
    return {
        "unet": unet, "scheduler": EulerDiscreteScheduler(**parts.BETAS), "vae": tiny.vae(),
        "text_encoder": _chatglm(), "tokenizer": _tokenizer(),
    }  # fmt: skip


@case("KolorsPipeline", FAMILY, "text to image", parts.sized)
def text_to_image() -> Any:
    return KolorsPipeline(**_components())


def _pictured(i: int) -> dict[str, Any]:
    return parts.sized(i) | {"image": parts.picture(i), "strength": 0.8}


@case("KolorsImg2ImgPipeline", FAMILY, "image to image", _pictured)
def image_to_image() -> Any:
    return KolorsImg2ImgPipeline(**_components())
