"""Kandinsky 3: a U-Net that attends to the states of a large text encoder."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, SIZED, case
from conformance.claims import LEAKS
from conformance.parts_cascade import EQUAL_LENGTHS, movq
from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 64, "width": 64}


def _equal_inputs(i: int) -> dict[str, Any]:
    return {**_inputs(i), "prompt": EQUAL_LENGTHS[i]}


@case(
    "Kandinsky3Pipeline", "Kandinsky 3", "text to image", _inputs,
    alone=SIZED, because=LEAKS,  # it pools text without the mask
)  # fmt: skip
def text_to_image() -> Any:
    return _pipeline()


@case("Kandinsky3Pipeline", "Kandinsky 3", "text to image", _equal_inputs, variant="equal lengths")
def equal_lengths() -> Any:
    return _pipeline()


def _pipeline() -> Any:
    unet = Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=4, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(8, 16), cross_attention_dim=16, encoder_hid_dim=32,
    )  # fmt: skip
    return Kandinsky3Pipeline(
        unet=tiny.scaled(unet, 1.2), scheduler=DDPMScheduler(clip_sample=False), movq=movq(), text_encoder=tiny.t5(),
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
