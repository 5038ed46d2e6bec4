"""OmniGen: one language model reads text and source pictures and draws; its processor needs torchvision."""

from __future__ import annotations

import importlib.util
from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, case
from conformance.parts_dit import picture, vae8

_FIRST_ROW = "the model rotates every row by the positions of the first one"
_TAG = "<img><|image_1|></img>"


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "height": 32, "width": 32}


def _edited(i: int) -> dict[str, Any]:
    return _inputs(i) | {
        "prompt": f"{PROMPTS[i]} {_TAG}", "input_images": [picture(i)], "img_guidance_scale": 1.6 + i,
        "max_input_image_size": 32,
    }  # fmt: skip


def _pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenPipeline, OmniGenTransformer2DModel

    transformer = OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, num_layers=2, pad_token_id=0, vocab_size=tiny.VOCABULARY, time_step_dim=16,
        pos_embed_max_size=16,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "su"},
    )  # fmt: skip
    vae = vae8()
    with torch.no_grad():  # a sharp posterior, since the pipeline samples it without the request's generator
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -30.0
    return OmniGenPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=vae, tokenizer=tiny.tokenizer(1024),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    )  # fmt: skip


if importlib.util.find_spec("torchvision") is not None:
    case("OmniGenPipeline", "OmniGen", "text to image", _inputs, alone=_FIRST_ROW)(_pipeline)
    case("OmniGenPipeline", "OmniGen", "editing", _edited, variant="edit", alone=_FIRST_ROW)(_pipeline)
