"""Throughput on the built-in model beside its ceiling: the bare merged forward of the same run.

    python benchmarks/throughput.py [--requests 64] [--steps 20] [--rounds 3] [--json FILE]

One torch thread. In each round four things take turns: ``pipe(...)`` one request at a time, the engine with all
requests at once, the bare denoiser on one request's rows, and the bare denoiser on the rows of a full batch. Figures
are medians over rounds; ratios are formed inside a round, so that a slow moment of the machine hits both sides.

``ceiling``  gain of the bare merged forward over the bare single-request forward, at the best batch size.
``gain``     gain of the engine over ``pipe(...)`` one at a time, in requests per second.
``outside``  share of the engine's time that is outside all module forwards (encoders and VAE count as forwards).
``alone``    one request through ``mp`` against ``pipe(...)``, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy
import torch

from steploom import AsyncDiffusionEngine, EngineConfig, demo
from steploom.demo import scene

_SCENES = numpy.random.default_rng(0)


def prompt() -> str:
    """A prompt that was not asked for before (one in millions): nothing is answered from the text encoders' cache but
    the empty negative prompt, which real applications repeat too."""
    return scene.prompt(scene.random_scene(_SCENES, pairs=1.0))


def load() -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captured_call(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one real denoiser call."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe(prompt(), **{**arguments, "num_inference_steps": 1})
    hook.remove()
    return seen[0]


def bare(pipe: Any, call: dict[str, Any], requests: int, repeats: int = 5) -> float:
    """Seconds of one bare forward on the rows of ``requests`` requests, the median of ``repeats``."""
    merged = {k: torch.cat([v] * requests) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    times: list[float] = []
    with torch.no_grad():
        for _ in range(repeats):
            started = time.perf_counter()
            pipe.transformer(**merged)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def serial(pipe: Any, arguments: dict[str, Any], requests: int) -> float:
    """Seconds per request of ``pipe(...)``, one at a time."""
    started = time.perf_counter()
    for i in range(requests):
        pipe(prompt(), generator=torch.Generator().manual_seed(i), **arguments)
    return (time.perf_counter() - started) / requests


async def together(engine: AsyncDiffusionEngine, arguments: dict[str, Any], requests: int) -> dict[str, float]:
    """Seconds per request of the engine, all at once; share outside forwards; mean sharing."""
    before = await engine.collective_rpc("stats", unique_reply_rank=0)
    started = time.perf_counter()
    calls = [engine.generate(prompt(), seed=i, **arguments) for i in range(requests)]
    outputs = await asyncio.gather(*calls)
    seconds = time.perf_counter() - started
    after = await engine.collective_rpc("stats", unique_reply_rank=0)
    return {
        "per_request_s": seconds / requests,
        "outside": 1 - (after.forward_s - before.forward_s) / seconds,
        "in_ticks": (after.tick_s - before.tick_s) / seconds,
        "mean_batch_requests": statistics.mean(out.timings.mean_batch_requests for out in outputs),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    pipe = load()
    arguments: dict[str, Any] = {"num_inference_steps": options.steps, "max_sequence_length": options.text}
    call = captured_call(pipe, arguments)
    sizes = {size: bare(pipe, call, size) / size for size in (1, 2, 4, 8, 16, 32, 64) if size <= options.requests}
    best = min(sizes, key=lambda size: sizes[size])
    rounds: list[dict[str, float]] = []
    config = EngineConfig(max_batch=best, max_resident=2 * best, torch_threads=1)
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=best) as engine, AsyncDiffusionEngine(config) as mp:
        await together(engine, {**arguments, "num_inference_steps": 2}, best)  # probing and verification
        await together(mp, {**arguments, "num_inference_steps": 2}, best)
        serial(pipe, arguments, 1)
        for _ in range(options.rounds):
            gc.collect()
            row = await one_round(pipe, call, best, arguments, options, engine, mp)
            rounds.append(row)
            print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    return {
        "best_batch": best,
        "bare_s_per_request": sizes,
        "medians": medians,
        "rounds": rounds,
        "options": vars(options),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }


async def one_round(
    pipe: Any, call: dict[str, Any], best: int, arguments: dict[str, Any], options: argparse.Namespace,
    engine: AsyncDiffusionEngine, mp: AsyncDiffusionEngine,
) -> dict[str, float]:  # fmt: skip
    one = serial(pipe, arguments, 3)
    single = bare(pipe, call, 1, 15)
    merged = bare(pipe, call, best, 7) / best
    row = await together(engine, arguments, options.requests)
    merged = statistics.mean([merged, bare(pipe, call, best, 7) / best])
    single = statistics.mean([single, bare(pipe, call, 1, 15)])
    one = statistics.mean([one, serial(pipe, arguments, 3)])
    direct, through = [], []
    for _ in range(options.pairs):
        direct.append(serial(pipe, arguments, 1))
        through.append((await together(mp, arguments, 1))["per_request_s"])
    row |= {
        "ceiling": single / merged,
        "gain": one / row["per_request_s"],
        "share": (one / row["per_request_s"]) / (single / merged),
        "alone": statistics.median(b / a for a, b in zip(direct, through, strict=True)),
        "pipe_s": one,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of one request through mp and through pipe(...)")
    parser.add_argument("--text", type=int, default=16, help="max_sequence_length")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    result = asyncio.run(measure(options))
    m = result["medians"]
    print(f"\nbest batch {result['best_batch']}; bare merged forward: {m['ceiling']:.2f} times alone (the ceiling)")
    print(f"engine: {m['gain']:.2f} times pipe(...) one at a time = {m['share']:.0%} of the ceiling")
    print(f"outside all module forwards: {m['outside']:.1%}; one request through mp: {m['alone']:.2f} times pipe(...)")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**result, "options": {**result["options"], "json": None}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
