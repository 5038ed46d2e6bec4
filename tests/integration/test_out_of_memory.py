"""Out of memory in a merged forward: it is bisected, nobody fails, and the next batches are smaller."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import tiny
import torch
from driving import alone, distance, request

from steploom import AsyncDiffusionEngine

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 12, "max_sequence_length": 16}
ROOM = 8
"""Rows that the pretended device has memory for: four guided requests."""


@pytest.mark.asyncio
async def test_nobody_fails_and_the_batch_shrinks_until_it_fits() -> None:
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, **SMALL) for n in range(6)]
    expected = [alone(pipe, one) for one in asked]
    rows: list[int] = []

    def tight(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["hidden_states"]))
        if rows[-1] > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=6) as engine:
        warm = [request(f"w{n}", "a dog", n, **SMALL) for n in range(2)]
        await together(engine, warm)
        pipe.transformer.register_forward_pre_hook(tight, with_kwargs=True)
        found = await together(engine, asked)
        assert max(rows) > ROOM, "it was tried"
        await together(engine, [request(f"s{n}", f"a bird {n}", n, **SMALL) for n in range(6)])
        late = rows[len(rows) // 2 :]
        assert sum(count > ROOM for count in late) < len(late) / 4, "and not tried again and again"
    for result, wanted in zip(found, expected, strict=True):
        assert distance(result.output, wanted) <= 1e-4


async def together(engine: AsyncDiffusionEngine, asked: list[Any]) -> list[Any]:
    found: list[Any] = [None] * len(asked)

    async def run(place: int) -> None:
        one = asked[place]
        found[place] = await engine.generate(
            one.prompt, request_id=one.request_id, seed=one.seed, output_type=one.output_type, **one.params
        )

    async with anyio.create_task_group() as group:
        for place in range(len(asked)):
            group.start_soon(run, place)
    return found
