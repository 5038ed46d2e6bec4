"""Kandinsky 5: a transformer with separate text and visual blocks, for images and videos."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import NO_MASK
from conformance.parts_cascade import EQUAL_LENGTHS
from conformance.parts_video import hunyuan_vae, qwen_vl
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

SIZE = 32


def _image_inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": SIZE, "width": SIZE}


def _video_inputs(i: int) -> dict[str, Any]:
    return {**_image_inputs(i), "num_frames": 5, "max_sequence_length": 1024}


def _equal_image_inputs(i: int) -> dict[str, Any]:
    return {**_image_inputs(i), "prompt": EQUAL_LENGTHS[i]}


def _equal_video_inputs(i: int) -> dict[str, Any]:
    return {**_video_inputs(i), "prompt": EQUAL_LENGTHS[i]}


def _parts(**settings: Any) -> dict[str, Any]:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=32, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), **settings,
    )  # fmt: skip
    return {
        "transformer": tiny.scaled(transformer, 1.5), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": qwen_vl(), "tokenizer": tiny.tokenizer(2048), "text_encoder_2": tiny.clip(projected=False),
        "tokenizer_2": tiny.tokenizer(77),
    }  # fmt: skip


@case("Kandinsky5T2IPipeline", "Kandinsky 5", "text to image", _image_inputs, alone=SIZED, because=NO_MASK)
def text_to_image() -> Any:
    return _image_pipeline()


@case("Kandinsky5T2IPipeline", "Kandinsky 5", "text to image", _equal_image_inputs, variant="equal lengths")
def text_to_image_equal_lengths() -> Any:
    return _image_pipeline()


def _image_pipeline() -> Any:
    pipeline = Kandinsky5T2IPipeline(**_parts(), vae=tiny.vae())
    pipeline.resolutions = [(SIZE, SIZE)]  # it rounds to one of these
    return pipeline


@case("Kandinsky5T2VPipeline", "Kandinsky 5", "text to video", _video_inputs, alone=SIZED, because=NO_MASK)
def text_to_video() -> Any:
    return _video_pipeline()


@case("Kandinsky5T2VPipeline", "Kandinsky 5", "text to video", _equal_video_inputs, variant="equal lengths")
def text_to_video_equal_lengths() -> Any:
    return _video_pipeline()


def _video_pipeline() -> Any:
    return Kandinsky5T2VPipeline(**_parts(visual_cond=True), vae=hunyuan_vae())
