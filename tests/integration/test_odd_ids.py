"""Ids that the model does not have, and texts longer than it has positions for, are the request's fault, by name."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import diffusers
import pytest
import tiny_language
import torch
from conformance.case import CASES

from steploom import AsyncDiffusionEngine, InvalidRequest
from steploom.worker.traits import id_tables

TEXT: dict[str, Any] = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4}


async def test_labels_that_the_model_does_not_have_are_refused_with_those_that_it_has() -> None:
    async with AsyncDiffusionEngine.from_pipeline(CASES["DiTPipeline"].build()) as engine:
        (count,) = engine.info.ids.values()
        for label in (count, -1):
            with pytest.raises(InvalidRequest, match=rf"class_labels=\[{label}\]: this DiT.* from 0 to {count - 1}$"):
                await engine.generate(class_labels=[label], num_inference_steps=2)
        assert await engine.generate(class_labels=[count - 1], num_inference_steps=2, output_type="np")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"prompt": "a", "mask_token_id": 10**6}, "mask_token_id"),
        ({"input_ids": torch.tensor([[5, 10**6]])}, "input_ids"),
        ({"input_ids": torch.tensor([[5, -3]])}, "input_ids"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"prompt": "a", "block_length": 100}, "block_length"),
    ],
)
async def test_what_a_language_model_has_no_tokens_or_positions_for_is_told_by_name(params: Any, field: str) -> None:
    async with AsyncDiffusionEngine.from_pipeline(tiny_language.llada()) as engine:
        with pytest.raises(InvalidRequest) as refused:
            await engine.generate(**TEXT | params)
        assert f"{field}=" in str(refused.value)
        assert refused.value.field in {field, "block_length"}
        assert (await engine.generate("b", **TEXT)).text


def test_a_unet_has_as_many_labels_as_its_table() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), num_class_embeds=7,
    )  # fmt: skip
    pipe = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    assert id_tables.told(pipe, unet) == {"class_labels": 7}
