"""Step caching on the built-in model: what is gained and what is lost, by threshold.

    python benchmarks/step_cache.py [--prompts 60] [--steps 24] [--json FILE] [--sheet FILE]

One torch thread. The prompts are of combinations that the model never saw in training; each has a seed of its own, the
same at every threshold. They run in chunks, all requests of a chunk at once. Within a chunk the thresholds take turns,
beginning with another one each time, and texts are encoded before the clock starts.

``skipped``   share of all steps that made no denoiser call.
``speed_up``  seconds of this process on the CPU without step caching over those with it, whoever else uses the machine:
              the median over chunks, which are listed beside it.
``wall``      the same by the clock on the wall.
``content``   share of pictures whose shapes, colours and background are as asked for, by the pixel checker.
``everything``  likewise, sizes and the relation too.
``changed``   share of pictures of which the checker says otherwise than of the uncached one.
``levels``    mean absolute difference from the uncached picture, in grey levels of 255.
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
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image, ImageDraw

from steploom import AsyncDiffusionEngine, DiffusionOutput, EngineConfig
from steploom.demo import checker, scene

THRESHOLDS = (0.0, 0.025, 0.05, 0.1, 0.2, 0.4)
LABEL, TILE = 96, 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=10)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--max-batch", type=int, default=10)
    parser.add_argument("--columns", type=int, default=8, help="pictures in a row of the sheet")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    return parser.parse_args()


def held_out(count: int) -> list[scene.Scene]:
    rng = np.random.default_rng(2024)
    scenes: dict[scene.Scene, None] = {}
    while len(scenes) < count:
        scenes[scene.random_scene(rng, held_out=True)] = None
    return list(scenes)


async def draw(engine: AsyncDiffusionEngine, scenes: list[scene.Scene], first: int, steps: int, cache: str) -> Any:
    """All scenes at once: their outputs, and the seconds that it took, on the CPU and on the wall."""
    arguments = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": TILE, "width": TILE,
                 "max_sequence_length": 16, "output_type": "np", "cache": cache}  # fmt: skip
    started = time.process_time(), time.perf_counter()
    outputs = await asyncio.gather(
        *(engine.generate(scene.prompt(one), seed=first + i, **arguments) for i, one in enumerate(scenes))
    )
    return outputs, (time.process_time() - started[0], time.perf_counter() - started[1])


async def measure(args: argparse.Namespace, scenes: list[scene.Scene]) -> tuple[Any, Any]:
    """By threshold: all outputs, and seconds by chunk."""
    outputs: dict[float, list[DiffusionOutput]] = {threshold: [] for threshold in THRESHOLDS}
    seconds: dict[float, list[tuple[float, float]]] = {threshold: [] for threshold in THRESHOLDS}
    config = EngineConfig(distributed_executor_backend="inproc", torch_threads=1, max_batch=args.max_batch)
    async with AsyncDiffusionEngine(config) as engine:
        for place, start in enumerate(range(0, len(scenes), args.chunk)):
            chunk = scenes[start : start + args.chunk]
            await draw(engine, chunk, start, 2, "off")
            turn = place % len(THRESHOLDS)
            for threshold in (*THRESHOLDS[turn:], *THRESHOLDS[:turn]):
                made, took = await draw(engine, chunk, start, args.steps, f"easycache:{threshold}")
                outputs[threshold] += made
                seconds[threshold].append(took)
    return outputs, seconds


def pixels(output: DiffusionOutput) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (output.images[0] * 255).round().astype(np.uint8)


def figures(outputs: Any, seconds: Any, scenes: list[scene.Scene]) -> list[dict[str, Any]]:
    """A row for each threshold."""
    rows: list[dict[str, Any]] = []
    plain = [pixels(output) for output in outputs[0.0]]
    before = [checker.check(picture, one) for picture, one in zip(plain, scenes, strict=True)]
    for threshold in THRESHOLDS:
        pictures = [pixels(output) for output in outputs[threshold]]
        verdicts = [checker.check(picture, one) for picture, one in zip(pictures, scenes, strict=True)]
        timings = [output.timings for output in outputs[threshold]]
        pairs = list(zip(seconds[0.0], seconds[threshold], strict=True))
        ratios, walls = ([one[i] / other[i] for one, other in pairs] for i in (0, 1))
        apart = [np.abs(one.astype(int) - other).mean() for one, other in zip(pictures, plain, strict=True)]
        rows.append({
            "threshold": threshold,
            "skipped": round(sum(one.skipped_steps for one in timings) / sum(one.steps for one in timings), 3),
            "speed_up": round(statistics.median(ratios), 2), "speed_ups": [round(ratio, 2) for ratio in ratios],
            "wall": round(statistics.median(walls), 2),
            "content": round(sum(one.content for one in verdicts) / len(verdicts), 3),
            "everything": round(sum(one.everything for one in verdicts) / len(verdicts), 3),
            "changed": round(sum(a != b for a, b in zip(verdicts, before, strict=True)) / len(verdicts), 3),
            "levels": round(float(np.mean(apart)), 2),
        })  # fmt: skip
    return rows


def sheet(outputs: Any, rows: list[dict[str, Any]], columns: int) -> Image.Image:
    """The first pictures of each threshold, a row for each."""
    made = Image.new("RGB", (LABEL + columns * (TILE + 2), len(THRESHOLDS) * (TILE + 2)), "white")
    draw = ImageDraw.Draw(made)
    for y, row in enumerate(rows):
        label = "off" if row["threshold"] == 0 else f"easycache:{row['threshold']:g}"
        draw.text((4, y * (TILE + 2) + 18), f"{label}\n{row['skipped']:.0%} skipped", fill="black")
        for x, output in enumerate(outputs[row["threshold"]][:columns]):
            made.paste(Image.fromarray(pixels(output)), (LABEL + x * (TILE + 2), y * (TILE + 2)))
    return made


def main() -> None:
    args = parse()
    scenes = held_out(args.prompts)
    outputs, seconds = asyncio.run(measure(args, scenes))
    rows = figures(outputs, seconds, scenes)
    for row in rows:
        print(json.dumps(row))
    result = {
        "prompts": args.prompts, "steps": args.steps, "max_batch": args.max_batch, "chunk": args.chunk, "rows": rows,
        "torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version(),
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.sheet is not None:
        sheet(outputs, rows, args.columns).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
