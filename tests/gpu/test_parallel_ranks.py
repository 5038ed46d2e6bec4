"""Ranks that share each forward, over NCCL: equal to ``pipe(...)`` alone. Needs two GPUs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from steploom import AsyncDiffusionEngine

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
pytestmark = [pytest.mark.gpu, TWO, pytest.mark.timeout(300)]

SMALL: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 16}
MIXED: list[tuple[str, dict[str, Any]]] = [
    ("a cat", {"num_inference_steps": 4, "guidance_scale": 3.5}),
    ("dogs", {"num_inference_steps": 6, "guidance_scale": 1.0}),
    ("odd", {"num_inference_steps": 3, "height": 36, "width": 36}),  # 81 tokens
]
TOLERANCE = 0.06
"""Of the scale of the latents, in bfloat16: attention on GPUs that can be shared is in half precision."""


@pytest.mark.parametrize(
    "settings",
    [
        {"ulysses_degree": 2},
        {"ring_degree": 2, "attention_backend": "_native_cudnn"},
        {"tensor_parallel_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
async def test_ranks_on_gpus_equal_the_pipeline_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    pipe = tiny.flux().to(dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    pipe.to("cuda").set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = [
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), return_dict=False, **SMALL | own)[0].cpu()
            for seed, (prompt, own) in enumerate(MIXED)
        ]
    async with AsyncDiffusionEngine(model=str(tmp_path), dtype="bfloat16", costs_file=None, **settings) as engine:
        for _ in range(2):
            outputs = await asyncio.gather(
                *(engine.generate(prompt, seed=seed, **SMALL | own) for seed, (prompt, own) in enumerate(MIXED))
            )
            for output, one in zip(outputs, expected, strict=True):
                distance = (output.output.images.float() - one.float()).abs().max()
                assert float(distance) < TOLERANCE * float(one.abs().max())
