"""What a second worker gains: requests per second of one worker and of two, in turns.

    python benchmarks/workers.py [--rounds 7] [--requests 64] [--size 64] [--steps 10] [--save]

Two engines with the built-in model, one of one worker process and one of two, each of one torch thread; one engine
serves while the other waits. It needs two cores that nobody else uses; the engine's own process (scheduling, taking in
images) uses them too, a little. ``--save`` writes ``benchmarks/results/workers.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from steploom import AsyncDiffusionEngine, EngineConfig

RESULTS = Path(__file__).parent / "results" / "workers.json"


async def throughput(engine: AsyncDiffusionEngine, options: argparse.Namespace) -> float:
    """Requests per second of so many that come at once."""

    async def one(seed: int) -> None:
        await engine.generate(
            f"a large red circle, {seed}", seed=seed, width=options.size, height=options.size,
            num_inference_steps=options.steps, max_sequence_length=16,
        )  # fmt: skip

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for seed in range(options.requests):
            group.create_task(one(seed))
    return options.requests / (time.perf_counter() - began)


async def measure(options: argparse.Namespace) -> dict[str, object]:
    config = EngineConfig(max_batch=options.max_batch, torch_threads=1, costs_file=None)
    pair = EngineConfig(max_batch=options.max_batch, torch_threads=1, costs_file=None, data_parallel_size=2)
    rounds: dict[int, list[float]] = {1: [], 2: []}
    async with AsyncDiffusionEngine(config) as one, AsyncDiffusionEngine(pair) as two:
        engines = {1: one, 2: two}
        for engine in (one, two, one, two):
            await throughput(engine, options)
        for number in range(options.rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                rounds[workers].append(await throughput(engines[workers], options))
    one_s, two_s = (statistics.median(rounds[workers]) for workers in (1, 2))
    each = [two / one for one, two in zip(rounds[1], rounds[2], strict=True)]
    gain = statistics.median(each)
    spread = f"rounds {min(each):.2f} to {max(each):.2f}"
    print(f"one worker {one_s:.2f} requests/s, two {two_s:.2f}: {gain:.2f} times ({spread})")
    return {"one": rounds[1], "two": rounds[2], "gain": gain, "gains": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()
    found = asyncio.run(measure(options))
    if options.save:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                   "python": platform.python_version(), "load_before": load}  # fmt: skip
        told = {name: value for name, value in vars(options).items() if name != "save"}
        RESULTS.write_text(json.dumps({"options": told, "machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
