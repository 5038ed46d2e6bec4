"""Ten thousand requests, three of ten cancelled: neither the engine's process nor the worker's grows."""

import os
import random
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import psutil
import pytest

from steploom import AsyncDiffusionEngine

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
CLIENTS = 24


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.asyncio
@pytest.mark.timeout(3000)
async def test_memory_stays_flat(tiny_model: Path) -> None:
    luck, engine_bytes, worker_bytes = random.Random(0), list[int](), list[int]()
    done = cancelled = 0

    async def client(engine: AsyncDiffusionEngine, worker: psutil.Process, numbers: Any) -> None:
        nonlocal done, cancelled
        for number in numbers:
            leaves = luck.uniform(0.0, 0.2) if luck.random() < 0.3 else None
            with anyio.move_on_after(leaves) as scope:
                await engine.generate(
                    f"a cat, {number % 50}", seed=number, width=(32, 48)[number % 5 == 0], height=32,
                    num_inference_steps=2 + number % 3, guidance_scale=(1.0, 5.0)[number % 2], max_sequence_length=16,
                )  # fmt: skip
                done += 1
            cancelled += scope.cancelled_caught
            if (done + cancelled) % 100 == 0:
                engine_bytes.append(psutil.Process().memory_info().rss)
                worker_bytes.append(worker.memory_info().rss)

    async with AsyncDiffusionEngine(model=str(tiny_model), torch_threads=1, max_batch=16, costs_file=None) as engine:
        (worker,) = psutil.Process().children()
        numbers = iter(range(REQUESTS))
        async with anyio.create_task_group() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(client, engine, worker, numbers)
    print(f"{done} done, {cancelled} cancelled")
    for name, sizes in (("engine", engine_bytes), ("worker", worker_bytes)):
        quarter = len(sizes) // 4
        early, late = median(sizes[quarter : 2 * quarter]), median(sizes[-quarter:])
        print(f"{name}: {early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} in the last")
        assert late <= 1.02 * early, f"the {name} grows"
