"""LoRA per request in a worker process: files are read there, by their paths, and the result is diffusers' own."""

from __future__ import annotations

import asyncio
import pathlib

import lora_files
import pytest
import tiny
from driving import alone, assert_cares, distance, request

from steploom import AsyncDiffusionEngine

COMMON = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16}


@pytest.mark.slow
async def test_adapters_of_requests_in_a_worker_process(tmp_path: pathlib.Path):
    tiny.sd3().save_pretrained(tmp_path / "model")
    a, b = (lora_files.save(tiny.sd3, tmp_path / name, seed, text=name == "b") for seed, name in enumerate("ab"))
    requests = [
        request("none", "a cat", 1, **COMMON),
        request("a", "a cat", 1, lora=[(a, 1.0)], **COMMON),
        request("b", "a cat", 1, lora=[("registered", 0.5)], **COMMON),
        request("both", "a cat", 1, lora=[(a, 0.7), ("registered", 0.4)], **COMMON),
    ]
    expected = {}
    for one in requests:
        chosen = tuple((b if name == "registered" else name, scale) for name, scale in one.adapters)
        expected[one.request_id] = alone(lora_files.adapted(tiny.sd3(), chosen), one)
    assert_cares(expected, 1e-4)
    async with AsyncDiffusionEngine(model=str(tmp_path / "model"), dtype="float32", loras={"registered": b}) as engine:
        for _ in range(2):  # the first time they are loaded, and merges are verified
            outputs = await asyncio.gather(*(engine.generate(one) for one in requests))
            for one, out in zip(requests, outputs, strict=True):
                assert distance(out.output, expected[one.request_id]) <= 1e-4, one.request_id
        assert max(out.timings.mean_batch_requests for out in outputs) > 2
        (stats,) = await engine.collective_rpc("stats")
        assert stats.lora_loads == 2
