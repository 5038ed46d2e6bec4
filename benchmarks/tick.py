"""What a tick costs beyond its forward, on a model so small that every microsecond shows.

    python benchmarks/tick.py [--requests 32] [--batch 8] [--steps 20] [--rounds 5] [--save]

A random Qwen-Image of two layers (0.34M parameters, width 64, 16 image tokens), embeddings given, latents out, one
torch thread, in process. In each round the bare merged forward and the engine take turns; figures are medians over
rounds, ratios are formed inside a round.

``share``        requests per second of the engine over those that the bare forward at the same batch would allow.
``outside_ms``   of a steady tick (nobody joins or leaves): seconds outside its forward; at most 0.5.
``around_ms``    set-up and tear-down of a request: what ticks with joins and ends take beyond steady ones; at most 1.
``own_ms``       what ``pipe(...)`` takes for a request beside its forwards: measured with forwards that cost nothing.
``bound``        the share that this leaves: one-at-a-time loops around merged forwards could not have more.
``two_sizes``    requests per second where two sizes alternate and 16 are resident, over those of one size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from steploom import AsyncDiffusionEngine
from steploom.engine.observer import EngineObserver

WIDTH, TOKENS = 64, 7
RESULT = Path(__file__).parent / "results" / "tick.json"


def build() -> Any:
    """The pipeline; its text encoder is never asked."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    return QwenImagePipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, **parts)


class Ticks(EngineObserver):
    """Notes of each tick: seconds, the forward's, who joined and who ended."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int, int]] = []

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        ends = sum(report.finished for report in result.reports)
        self.seen.append((result.seconds, result.forward_s, len(output.scheduled_new_reqs), ends))


def arguments(seed: int, steps: int, pixels: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, TOKENS, WIDTH, generator=noise),
        "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "num_inference_steps": steps, "height": pixels, "width": pixels, "seed": seed, "output_type": "latent",
        "true_cfg_scale": 1.0,
    }  # fmt: skip


def bare(pipe: Any, rows: int, pixels: int, repeats: int) -> float:
    """Seconds of the bare forward on ``rows`` rows, the median of ``repeats``."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = arguments(0, 1, pixels)
    pipe(generator=torch.Generator().manual_seed(given.pop("seed")), **given)
    hook.remove()
    call = {k: torch.cat([v] * rows) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in seen[0].items()}
    call["img_shapes"] = call["img_shapes"] * rows
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        pipe.transformer(**call)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def own_python(pipe: Any, steps: int, pixels: int, repeats: int = 5) -> float:
    """Seconds of a request whose forwards cost nothing: the pipeline's own loop, and what is before and after it."""
    given = arguments(0, steps, pixels)
    seed, forward = given.pop("seed"), pipe.transformer.forward
    answer: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        answer[:] = [answer[0] if answer else forward(*args, **kwargs)]
        return answer[0]

    times: list[float] = []
    pipe.transformer.forward = first
    try:
        for _ in range(repeats + 1):
            started = time.perf_counter()
            pipe(generator=torch.Generator().manual_seed(seed), **given)
            times.append(time.perf_counter() - started)
    finally:
        del pipe.transformer.forward
    return statistics.median(times[1:])


async def generate(engine: AsyncDiffusionEngine, options: argparse.Namespace, sizes: Callable[[int], int]) -> float:
    """Requests per second, all at once."""
    asked = [arguments(i, options.steps, sizes(i)) for i in range(options.requests)]
    started = time.perf_counter()
    await asyncio.gather(*(engine.generate(**one) for one in asked))
    return options.requests / (time.perf_counter() - started)


def costs(seen: list[tuple[float, float, int, int]]) -> dict[str, float]:
    """Milliseconds outside the forward of a steady tick, and of a request's coming and going."""
    steady = [whole - forward for whole, forward, joins, ends in seen if not joins and not ends]
    others = [(whole - forward, joins, ends) for whole, forward, joins, ends in seen if joins or ends]
    usual = statistics.median(steady)
    extra = sum(outside - usual for outside, _, _ in others)
    requests = sum(joins for _, joins, _ in others) or 1
    return {"outside_ms": 1000 * usual, "around_ms": 1000 * extra / requests}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    side = pipe.vae_scale_factor * 2
    small, large = 4 * side, 6 * side
    rounds: list[dict[str, float]] = []
    settings = {"max_batch": options.batch, "max_resident": 2 * options.batch, "max_waiting": options.requests}
    async with AsyncDiffusionEngine.from_pipeline(pipe, **settings) as engine:
        ticks = Ticks()
        engine.observers.append(ticks)
        for _ in range(2):
            await generate(engine, options, lambda i: large if i % 2 else small)
        for _ in range(options.rounds):
            forward = bare(pipe, options.batch, small, 40)
            ticks.seen.clear()
            rate = await generate(engine, options, lambda _: small)
            row = costs(ticks.seen)
            both = await generate(engine, options, lambda i: large if i % 2 else small)
            forward = statistics.mean([forward, bare(pipe, options.batch, small, 40)])
            own, allowed = own_python(pipe, options.steps, small), options.batch / (forward * options.steps)
            row |= {"forward_ms": 1000 * forward, "own_ms": 1000 * own, "per_s": rate, "share": rate / allowed}
            row |= {"bound": 1 / (1 + own * allowed), "two_sizes": both / rate}
            rounds.append(row)
            print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    return {
        "medians": {name: statistics.median(row[name] for row in rounds) for name in rounds[0]},
        "rounds": rounds,
        "options": {name: value for name, value in vars(options).items() if name != "save"},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="goes into the record")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    result = asyncio.run(measure(options))
    m = result["medians"]
    print(f"\nengine: {m['share']:.0%} of what the bare forward allows ({m['per_s']:.1f} requests per second); "
          f"the pipeline's own {m['own_ms']:.2f} ms a request leave {m['bound']:.0%}")  # fmt: skip
    print(f"a steady tick: {m['forward_ms']:.2f} ms forward, {m['outside_ms']:.2f} ms outside; "
          f"a request's coming and going: {m['around_ms']:.2f} ms; two sizes: {m['two_sizes']:.2f} of one")  # fmt: skip
    if options.save:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
