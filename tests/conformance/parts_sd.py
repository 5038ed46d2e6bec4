"""Parts of the tiny UNet pipelines: Stable Diffusion, its XL, and what conditions them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny
import torch
from conformance.case import PROMPTS
from conformance.pictures import picture
from diffusers import ControlNetModel, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SIZE = 32
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LAYOUT: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": (2, 4), "norm_num_groups": 4,
}  # fmt: skip
LAYOUT_XL: dict[str, Any] = LAYOUT | {
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1), "cross_attention_dim": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
UP_XL = ("CrossAttnUpBlock2D", "UpBlock2D")


def text(i: int) -> dict[str, Any]:
    """Prompt and guidance of request ``i``."""
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i}


def sized(i: int) -> dict[str, Any]:
    """The same with the size, for pipelines that take no image to derive it from."""
    return text(i) | {"height": SIZE, "width": SIZE}


def mask(i: int, size: int = SIZE) -> Any:
    """White where to paint: a band of rows, another for each ``i``."""
    band = np.zeros((size, size), dtype=np.uint8)
    band[4 * i : size // 2 + 4 * i] = 255
    return Image.fromarray(band, "L")


def pictured(i: int) -> dict[str, Any]:
    """Prompt, guidance and image."""
    return text(i) | {"image": picture(i)}


def perturbed(i: int) -> dict[str, Any]:
    """For perturbed-attention guidance."""
    return sized(i) | {"pag_scale": 2.0 + i}


def ddim(**changes: Any) -> Any:
    """DDIM as Stable Diffusion was trained for."""
    return DDIMScheduler(**BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | changes)


def unet(factor: float = 1.2, **changes: Any) -> Any:
    """As in Stable Diffusion 1.5, two levels of it."""
    settings = LAYOUT | {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return tiny.scaled(UNet2DConditionModel(**settings | changes), factor)


def unet_xl(pooled: int = 32, time_ids: int = 6, **changes: Any) -> Any:
    """As in Stable Diffusion XL, two levels of it."""
    settings = LAYOUT_XL | {"sample_size": 16, "in_channels": 4, "out_channels": 4, "up_block_types": UP_XL}
    return tiny.scaled(
        UNet2DConditionModel(**settings | {"projection_class_embeddings_input_dim": pooled + 8 * time_ids} | changes),
        1.2,
    )


def controlnet(kind: Any = ControlNetModel, **changes: Any) -> Any:
    """Matches :func:`unet`."""
    settings = LAYOUT | {
        "in_channels": 4, "cross_attention_dim": 32, "conditioning_embedding_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    }  # fmt: skip
    return tiny.scaled(kind(**settings | changes), 1.2, 7)


def controlnet_xl(kind: Any = ControlNetModel, **changes: Any) -> Any:
    """Matches :func:`unet_xl`."""
    return controlnet(kind, **LAYOUT_XL | {"projection_class_embeddings_input_dim": 32 + 6 * 8} | changes)


def parts(scheduler: Any = None, checked: bool = True, **changes: Any) -> dict[str, Any]:
    """Components of a Stable Diffusion pipeline; ``changes`` are settings of its UNet.

    Args:
        scheduler: PNDM, as published, if not given.
        checked: Whether the class knows a safety checker; there is none.
    """
    found = {
        "unet": unet(**changes), "vae": tiny.vae(), "text_encoder": tiny.clip(projected=False, seed=1),
        "tokenizer": tiny.tokenizer(),
        "scheduler": scheduler or PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    }  # fmt: skip
    if checked:
        found |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return found


def parts_xl(scheduler: Any, **changes: Any) -> dict[str, Any]:
    """Components of a Stable Diffusion XL pipeline; ``changes`` are settings of its UNet."""
    return {
        "unet": unet_xl(**changes), "scheduler": scheduler, "vae": tiny.vae(), "tokenizer": tiny.tokenizer(),
        "text_encoder": tiny.clip(projected=False, seed=1), "text_encoder_2": tiny.clip(seed=2),
        "tokenizer_2": tiny.tokenizer(),
    }  # fmt: skip


def vision(width: int = 32, seed: int = 9) -> Any:
    """A CLIP image encoder for pictures of :data:`SIZE`."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_attention_heads=4,
        num_hidden_layers=2, image_size=SIZE, patch_size=8,
    )  # fmt: skip
    return tiny.scaled(CLIPVisionModelWithProjection(config), 1.5, seed)


def image_processor() -> Any:
    """What prepares pictures for :func:`vision`."""
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def ip_adapter(net: Any, width: int = 32, tokens: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of an IP-Adapter for a UNet, named as they are published."""
    noise = torch.Generator().manual_seed(11)
    text_width = net.config.cross_attention_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise) / shape[-1] ** 0.5

    layers: dict[str, torch.Tensor] = {}
    crossed = [name for name in net.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(crossed):
        channels = net.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{key}.weight"] = random(channels, text_width)
    projection = {
        "proj.weight": random(tokens * text_width, width), "proj.bias": torch.zeros(tokens * text_width),
        "norm.weight": torch.ones(text_width), "norm.bias": torch.zeros(text_width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}
