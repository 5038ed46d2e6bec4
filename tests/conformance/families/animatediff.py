"""AnimateDiff: motion modules between the layers of a Stable Diffusion U-Net."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.parts_cascade import ddim, unet
from conformance.pictures import picture
from diffusers import (
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    MotionAdapter,
    PIAPipeline,
)

FRAMES = 2


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 16, "width": 16, "num_frames": FRAMES}


def _guided_twice(i: int) -> dict[str, Any]:
    return {**_inputs(i), "pag_scale": 3.0 + i}


def _from_video(i: int) -> dict[str, Any]:
    video = [picture(10 * i + frame, 16) for frame in range(FRAMES)]
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 16, "width": 16, "video": video, "strength": 0.9}


def _from_image(i: int) -> dict[str, Any]:
    return {**_inputs(i), "image": picture(i, 16), "motion_scale": i}


def _motion(**settings: Any) -> Any:
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
        **settings,
    )  # fmt: skip
    return tiny.scaled(adapter, 1.5, 7)


def _parts() -> dict[str, Any]:
    return {
        "unet": unet(), "motion_adapter": _motion(), "scheduler": ddim(), "vae": tiny.vae(),
        "text_encoder": tiny.clip(projected=False), "tokenizer": tiny.tokenizer(),
    }  # fmt: skip


@case("AnimateDiffPipeline", "AnimateDiff", "text to video", _inputs)
def text_to_video() -> Any:
    return AnimateDiffPipeline(**_parts())


@case("AnimateDiffPAGPipeline", "AnimateDiff", "text to video", _guided_twice)
def perturbed_attention() -> Any:
    return AnimateDiffPAGPipeline(**_parts(), pag_applied_layers="mid_block.*attn1")


@case("AnimateDiffVideoToVideoPipeline", "AnimateDiff", "video to video", _from_video)
def video_to_video() -> Any:
    return AnimateDiffVideoToVideoPipeline(**_parts())


@case("PIAPipeline", "PIA", "image to video", _from_image)
def image_to_video() -> Any:
    return PIAPipeline(**{**_parts(), "motion_adapter": _motion(conv_in_channels=9)})


@case("AnimateDiffSDXLPipeline", "AnimateDiff", "text to video", _inputs)
def large() -> Any:
    inner = unet(
        64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=1, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    own = {"unet": inner, "text_encoder_2": tiny.clip(seed=2), "tokenizer_2": tiny.tokenizer()}
    return AnimateDiffSDXLPipeline(**{**_parts(), **own})
