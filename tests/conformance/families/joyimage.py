"""JoyImage-Edit: reference and result as items of one sequence."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import NO_MASK
from conformance.parts_dit import chat_tokenizer, qwen3_vl_generating, qwen3_vl_processor
from conformance.pictures import picture
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
)
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor


def _drawn(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32}


def _edited(i: int) -> dict[str, Any]:
    return _drawn(i) | {"image": picture(i)}


class _AnySize(JoyImageEditImageProcessor):
    """The pipeline's own rounds to the nearest of its sizes, all of about a megapixel."""

    def get_default_height_width(self, image: Any, height: int | None = None, width: int | None = None) -> Any:
        return height, width


def _vae() -> Any:
    """Its posterior is sharp, since the pipeline samples it without the request's generator."""
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tiny.scaled(vae)
    with torch.no_grad():
        vae.quant_conv.weight[16:] = 0.0
        vae.quant_conv.bias[16:] = -30.0
    return vae


def _pipeline() -> Any:
    transformer = JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=32, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    pipeline = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0), vae=_vae(), text_encoder=qwen3_vl_generating(),
        tokenizer=chat_tokenizer(256), transformer=tiny.scaled(transformer, 1.5), processor=qwen3_vl_processor(256),
    )  # fmt: skip
    pipeline.prompt_template_encode = {"image": "{}", "multiple_images": "{}"}
    pipeline.prompt_template_encode_start_idx = {"image": 0, "multiple_images": 0}
    pipeline.vae_image_processor = _AnySize(vae_scale_factor=8)
    return pipeline


@case("JoyImageEditPipeline", "JoyImage-Edit", "editing", _edited, alone=SIZED, because=NO_MASK)
def edited() -> Any:
    return _pipeline()


@case("JoyImageEditPipeline", "JoyImage-Edit", "text to image", _drawn, variant="drawn", alone=SIZED, because=NO_MASK)
def drawn() -> Any:
    return _pipeline()
