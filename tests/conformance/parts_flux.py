"""Pictures, masks and chat templates shared by the Flux, Qwen-Image, Z-Image and related families."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"
"""A chat template of few tokens."""


def picture(i: int, size: int = 32) -> Image.Image:
    """The picture of request ``i``: noise over a gradient."""
    noise = np.random.default_rng(i)
    slope = np.linspace(0.0, 1.0 + i, size)[:, None, None] % 1.0
    pixels = 0.5 * slope + 0.5 * noise.random((size, size, 3))
    return Image.fromarray((pixels * 255).astype(np.uint8))


def mask(i: int, size: int = 32) -> Image.Image:
    """The mask of request ``i``: a rectangle, larger with ``i``."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[size // 4 :, : size // 2 + i * size // 8] = 255
    return Image.fromarray(pixels)


def chat_tokenizer(length: int = 64) -> Any:
    """A byte-level tokenizer with a chat template."""
    tokenizer = tiny.tokenizer(length)
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(kind: Any = Qwen3ForCausalLM, *, layers: int = 2) -> Any:
    """A Qwen3 text encoder of 32 channels."""
    config = Qwen3Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tiny.scaled(kind(config), 1.5, 4)


def certain(vae: Any) -> Any:
    """``vae`` with a posterior so narrow that a sample of it is its mean."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0.0
        vae.quant_conv.bias[channels:] = -30.0
    return vae
