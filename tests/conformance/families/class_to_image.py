"""Models conditioned on a class: DiT and consistency models."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import case
from conformance.parts_cascade import ddim
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)


def _inputs(i: int) -> dict[str, Any]:
    return {"class_labels": [i], "guidance_scale": 3.0 + i, "output_type": "np"}


def _unguided_inputs(i: int) -> dict[str, Any]:
    return {"class_labels": i, "output_type": "pt"}


@case("DiTPipeline", "DiT", "class to image", _inputs)
def transformer() -> Any:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(transformer=tiny.scaled(model, 1.5), vae=tiny.vae(), scheduler=ddim())


@case("ConsistencyModelPipeline", "Consistency models", "class to image", _unguided_inputs)
def consistency() -> Any:
    model = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, num_class_embeds=10,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    return ConsistencyModelPipeline(unet=tiny.scaled(model, 1.2), scheduler=scheduler)
