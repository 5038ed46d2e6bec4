"""Parts that the video families share: pictures, clips, VAEs, text and image encoders."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import tiny
from conformance.pictures import picture
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, UniPCMultistepScheduler
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)


def clip(i: int, frames: int, size: int = 32) -> list[Image.Image]:
    """A random video, another for every ``i``."""
    return [picture(1000 * i + frame, size) for frame in range(frames)]


def without_ftfy(module: str) -> None:
    """Some pipelines call ftfy, which only mends broken text, without checking that it is installed."""
    pipelines = importlib.import_module(f"diffusers.pipelines.{module}")
    if not hasattr(pipelines, "ftfy"):
        pipelines.__dict__["ftfy"] = SimpleNamespace(fix_text=lambda text: text)


def without_torchvision() -> None:
    """Cosmos resizes its padding mask with torchvision, likewise without checking."""
    cosmos = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if not hasattr(cosmos, "transforms"):
        functional = SimpleNamespace(resize=lambda mask, size, interpolation: interpolate(mask, size))
        modes = SimpleNamespace(NEAREST="nearest")
        cosmos.__dict__["transforms"] = SimpleNamespace(functional=functional, InterpolationMode=modes)


def wan_vae(channels: int = 16, **extra: Any) -> Any:
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    return tiny.scaled(
        AutoencoderKLWan(
            base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], **statistics, **extra,
        ), 1.2, 5,
    )  # fmt: skip


def hunyuan_vae(channels: int = 4) -> Any:
    return tiny.scaled(
        AutoencoderKLHunyuanVideo(
            latent_channels=channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        ), 1.2, 5,
    )  # fmt: skip


def umt5(width: int = 32) -> Any:
    return tiny.t5(width, UMT5EncoderModel, UMT5Config)


def flow_unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def llama(width: int = 16) -> Any:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=32, num_attention_heads=4, num_hidden_layers=4,
        vocab_size=tiny.VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tiny.scaled(LlamaModel(config), 1.5, 3)


def qwen_vl(width: int = 32) -> Any:
    text = {
        "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": tiny.VOCABULARY,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vocab_size=tiny.VOCABULARY, image_token_id=250, video_token_id=251,
        vision_start_token_id=252, vision_end_token_id=253,
    )  # fmt: skip
    return tiny.scaled(Qwen2_5_VLForConditionalGeneration(config), 1.5)


def clip_vision_config(width: int = 16) -> Any:
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_attention_heads=2,
        num_hidden_layers=2, image_size=32, patch_size=16,
    )  # fmt: skip


def clip_vision(width: int = 16) -> Any:
    return tiny.scaled(CLIPVisionModel(clip_vision_config(width)), 1.5, 6)


def clip_processor() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
