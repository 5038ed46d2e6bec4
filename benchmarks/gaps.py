"""Gaps between ticks while others join and finish, with encoders and VAE beside the ticks and in them.

    python benchmarks/gaps.py [--denoising 16] [--joining 4] [--steps 60] [--rounds 3] [--threads 1] [--json FILE]

``--denoising`` requests denoise on the built-in model. Beside them ``--joining`` callers ask for short pictures, one
after the other, each with a text of its own, the first of ``--short`` steps, each other of one more: somebody is always
encoding, joining, finishing or decoding. Each round runs it in each of ``--modes``, one after the other in one process:
``off`` is all at once in the ticks. A gap is the time between the beginnings of two forwards of the denoiser, from the
first to the last one that all of the long requests share; times are those of this process, the in-process executor's.

``longest``  the longest gap over the median gap of the same run. ``p99`` likewise.
``joins_s``  what a short request takes, start to picture, the median; ``per_s``: how many requests' steps a second.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch

from steploom import AsyncDiffusionEngine, demo
from steploom.demo import scene

_SCENES = numpy.random.default_rng(0)


def prompt() -> str:
    """A prompt that nobody asked for before, so that it is encoded."""
    return scene.prompt(scene.random_scene(_SCENES, pairs=1.0))


async def joiners(
    engine: AsyncDiffusionEngine, options: argparse.Namespace, steps: int, over: asyncio.Event
) -> list[float]:
    """One caller after another, until it is over; seconds of each."""
    times: list[float] = []
    while not over.is_set():
        started = time.perf_counter()
        await engine.generate(prompt(), seed=len(times), num_inference_steps=steps, **options.shape)
        times.append(time.perf_counter() - started)
    return times


async def once(engine: AsyncDiffusionEngine, options: argparse.Namespace, forwards: list[tuple[float, int]]) -> Any:
    """All of it, once; the forwards' beginnings and rows are in ``forwards`` afterwards."""
    forwards.clear()
    over = asyncio.Event()

    async def long() -> list[float]:
        steps = options.steps
        calls = (
            engine.generate(prompt(), seed=i, num_inference_steps=steps, **options.shape)
            for i in range(options.denoising)
        )
        await asyncio.gather(*calls)
        over.set()
        return []

    callers = (joiners(engine, options, options.short + i, over) for i in range(options.joining))
    return [seconds for times in await asyncio.gather(long(), *callers) for seconds in times]


def figures(forwards: list[tuple[float, int]], rows: int) -> dict[str, float]:
    """Gaps between forwards of at least so many rows, from the first such to the last."""
    full = [i for i, (_, own) in enumerate(forwards) if own >= rows]
    begun = [at for at, _ in forwards[full[0] : full[-1] + 1]]
    gaps = sorted(b - a for a, b in itertools.pairwise(begun))
    median, steps = statistics.median(gaps), sum(own for _, own in forwards[full[0] : full[-1]]) / 2
    return {
        "median_s": median,
        "longest": gaps[-1] / median,
        "p99": gaps[int(0.99 * (len(gaps) - 1))] / median,
        "gaps": len(gaps),
        "per_s": steps / sum(gaps),
    }


async def measure(options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    from diffusers import DiffusionPipeline

    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds + 1):
        row: dict[str, dict[str, float]] = {}
        for name in options.modes if number % 2 else options.modes[::-1]:
            pipe = DiffusionPipeline.from_pretrained(demo.path())
            forwards: list[tuple[float, int]] = []

            def note(_: Any, __: Any, kwargs: Any, begun: list[tuple[float, int]] = forwards) -> None:
                begun.append((time.perf_counter(), len(kwargs["hidden_states"])))

            pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
            room = options.denoising + options.joining
            engine = AsyncDiffusionEngine.from_pipeline(pipe, max_batch=room, max_resident=2 * room, aside=name)
            async with engine:
                warm = argparse.Namespace(**{**vars(options), "steps": 4})
                await once(engine, warm, forwards)  # probing and verification
                times = await once(engine, options, forwards)
            row[name] = {**figures(forwards, 2 * options.denoising), "joins_s": statistics.median(times)}
        if number:  # the first warms the machine up
            rounds.append(row)
        print({name: {k: round(v, 3) for k, v in own.items()} for name, own in row.items()}, flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoising", type=int, default=16)
    parser.add_argument("--joining", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--short", type=int, default=4, help="steps of those who join")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the ticks")
    parser.add_argument("--size", type=int, default=64, help="pixels each way")
    parser.add_argument("--modes", nargs="+", default=["auto", "off"], help="values of EngineConfig.aside")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.shape = {"height": options.size, "width": options.size, "max_sequence_length": 16, "output_type": "np"}
    torch.set_num_threads(options.threads)
    rounds = asyncio.run(measure(options))
    medians = {
        name: {key: statistics.median(row[name][key] for row in rounds) for key in rounds[0][name]}
        for name in rounds[0]
    }
    for name, own in medians.items():
        print(f"{name}: longest gap {own['longest']:.2f} of the median, {1000 * own['median_s']:.1f} ms; "
              f"p99 {own['p99']:.2f}; {own['per_s']:.0f} steps/s; a short request {own['joins_s']:.2f} s")  # fmt: skip
    if options.json:
        kept = {name: value for name, value in vars(options).items() if name not in ("json", "shape")}
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        result = {"medians": medians, "rounds": rounds, "options": kept, "machine": machine}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
