"""What ``batch_invariant`` costs: seconds of so many requests at once, with it and without, in turns.

    python benchmarks/batch_invariant.py [--rounds 5] [--most 8] [--size 64] [--steps 10] [--save]

Two engines with the built-in model, one worker of one thread each; one serves while the other waits. Every forward has
``--most`` requests where bits do not depend on company, so few at once pay most. ``--save`` writes
``benchmarks/results/batch_invariant.json``.
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

RESULTS = Path(__file__).parent / "results" / "batch_invariant.json"


async def seconds(engine: AsyncDiffusionEngine, count: int, options: argparse.Namespace) -> float:
    """Until the last of ``count`` requests that come at once is done."""

    async def one(seed: int) -> None:
        await engine.generate(
            f"a large red circle, {seed}", seed=seed, width=options.size, height=options.size,
            num_inference_steps=options.steps, max_sequence_length=16,
        )  # fmt: skip

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for seed in range(count):
            group.create_task(one(seed))
    return time.perf_counter() - began


async def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= options.most]
    config = EngineConfig(max_batch=options.most, torch_threads=1, encode_cache_bytes=0)
    invariant = EngineConfig(max_batch=options.most, torch_threads=1, encode_cache_bytes=0, batch_invariant=True)
    times: dict[tuple[int, bool], list[float]] = {}
    async with AsyncDiffusionEngine(config) as plain, AsyncDiffusionEngine(invariant) as fixed:
        for engine in (plain, fixed):
            await seconds(engine, options.most, options)
        for number in range(options.rounds):
            for count in counts:
                pair = [(False, plain), (True, fixed)]
                for which, engine in pair if number % 2 == 0 else reversed(pair):
                    times.setdefault((count, which), []).append(await seconds(engine, count, options))
    found: dict[str, dict[str, float]] = {}
    for count in counts:
        off, on = (statistics.median(times[count, which]) for which in (False, True))
        found[str(count)] = {"off_s": off, "on_s": on, "times": on / off}
        print(f"{count:3} at once: {off:.3f} s without, {on:.3f} s with batch_invariant ({on / off:.2f} times)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=8, help="max_batch")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    if options.save:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                   "python": platform.python_version(), "load_before": os.getloadavg()}  # fmt: skip
        told = {name: value for name, value in vars(options).items() if name != "save"}
        RESULTS.write_text(json.dumps({"options": told, "machine": machine, "requests": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
