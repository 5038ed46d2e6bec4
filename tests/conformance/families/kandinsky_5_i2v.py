"""Kandinsky 5: the image to video pipeline."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import NO_MASK
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5I2VPipeline, Kandinsky5Transformer3DModel


def _image(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "image": parts.picture(i),
            "height": 32, "width": 32, "num_frames": 17}  # fmt: skip


@case("Kandinsky5I2VPipeline", "Kandinsky 5", "image to video", _image, alone=SIZED, because=NO_MASK)
def image_to_video() -> Any:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=32, model_dim=32, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip
    pipeline = Kandinsky5I2VPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.hunyuan_vae(), text_encoder=parts.qwen_vl(),
        tokenizer=tiny.tokenizer(2048), text_encoder_2=tiny.clip(projected=False), tokenizer_2=tiny.tokenizer(77),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.prompt_template, pipeline.prompt_template_encode_start_idx = "{}", 0
    return pipeline
