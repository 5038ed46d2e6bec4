"""The engine beside ``pipe(...)`` one at a time and the bare forward; how soon requests join and leave; the gaps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import torch

from gpu.case import Case
from gpu.forwards import Table, of_ticks, outside
from gpu.machine import Forwards, median
from gpu.watch import Watch
from steploom import AsyncDiffusionEngine, RequestCancelled

FOREVER = 1000
"""Steps of a request that is there for company, and cancelled at the end."""

QUIET_TICKS = 20


async def wave(case: Case, engine: AsyncDiffusionEngine, requests: list[dict[str, Any]]) -> tuple[float, list[Any]]:
    """Seconds per request of the engine for all of them at once, and the outputs. Seeds are 0, 1, 2..."""
    began = case.clock.now()
    outputs = await asyncio.gather(*(engine.generate(**one, seed=seed) for seed, one in enumerate(requests)))
    return (case.clock.now() - began) / len(requests), outputs


async def throughput(case: Case, engine: AsyncDiffusionEngine, table: Table, count: int) -> dict[str, Any]:
    """``count`` requests at once against one at a time and against the bare forwards, in turns."""
    rows = case.architecture.rows
    requests = [case.request(seed) for seed in range(count)]
    await wave(case, engine, [{**one, "num_inference_steps": 3} for one in requests])  # probing and verification
    turns: list[dict[str, float]] = []
    for _ in range(case.rounds):
        alone, expected = case.alone(requests[-1:], [count - 1])
        single, merged = table.once(rows), table.once(count * rows)
        with Forwards(case.module, case.clock) as forwards:
            together, outputs = await wave(case, engine, requests)
        turns.append({
            "pipe_s": alone,
            "engine_s": together,
            "gain": alone / together,
            "ceiling": single * count / merged,
            "difference": _difference(outputs[-1], expected),
            "shared": sum(out.timings.mean_batch_requests for out in outputs) / count,
            **outside(forwards, count * rows, case.architecture.calls_per_step),
        })  # fmt: skip
    figures = {name: median([turn[name] for turn in turns if name in turn]) for name in turns[0]}
    return {
        **figures,
        "share_of_ceiling": median([turn["gain"] / turn["ceiling"] for turn in turns]),
        "images_per_s": 1 / figures["engine_s"],
        "pipe_images_per_s": 1 / figures["pipe_s"],
        "steps": case.steps,
        "rounds": turns,
    }


def _difference(output: Any, expected: Any) -> float:
    """Largest difference of two results' latents, as a share of their scale."""
    latents = output.output[0].float().cpu()
    expected = torch.as_tensor(expected).float().cpu()
    return float((latents - expected).abs().max() / expected.abs().max())


@contextlib.asynccontextmanager
async def company(case: Case, engine: AsyncDiffusionEngine, watch: Watch, count: int) -> AsyncIterator[None]:
    """``count`` requests that denoise all the time, until the block is left."""
    ids = [f"company-{case.label}-{place}-{time.monotonic_ns()}" for place in range(count)]

    async def stay(place: int) -> None:
        with contextlib.suppress(RequestCancelled):
            await engine.generate(**case.request(place, FOREVER), seed=place, request_id=ids[place])

    async with asyncio.TaskGroup() as group:
        for place in range(count):
            group.create_task(stay(place))
        await watch.pass_ticks(3)
        try:
            yield
        finally:
            for request_id in ids:
                await engine.abort(request_id)


async def delays(case: Case, engine: AsyncDiffusionEngine, watch: Watch, count: int) -> dict[str, Any]:
    """How soon a request joins ``count - 1`` others, and how soon a cancelled one's place is free."""
    joined: list[dict[str, float]] = []
    freed: list[dict[str, float]] = []
    await wave(case, engine, [case.request(count, 3)])
    async with company(case, engine, watch, max(1, count - 1)):
        watch.clear()
        for place in range(case.repeats):
            async with engine.stream(**case.request(100 + place, 3), seed=place) as run:
                await run.result()
                joined.append(watch.join(run.request_id))
        for place in range(case.repeats):
            async with engine.stream(**case.request(200 + place, FOREVER), seed=place) as run:
                await watch.pass_ticks(3)
                asked = time.monotonic()
                await engine.abort(run.request_id)
                await watch.forgotten(run.request_id)
                freed.append(watch.cancel(run.request_id, asked))
    return {"others": max(1, count - 1), "join": _summary(joined), "cancel": _summary(freed)}


def _summary(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and worst of each."""
    names = found[0] if found else {}
    return {
        name: {"median": median([one[name] for one in found]), "worst": max(one[name] for one in found)}
        for name in names
    }


async def gaps(case: Case, engine: AsyncDiffusionEngine, watch: Watch, count: int) -> dict[str, Any]:
    """Ticks of ``count`` requests: when nothing else happens, and while others are encoded, join and are decoded.

    The longest of them are on the device where forwards can be marked there (``forwards``), and as the engine sees it.
    """
    with contextlib.suppress(RequestCancelled):
        await engine.generate(**case.worded(900, 2), seed=900)
    async with company(case, engine, watch, count):
        warm = await engine.generate(**case.worded(901, 2), seed=901)  # kinds of merges that were not verified yet
        watch.clear()
        with Forwards(case.module, case.clock) as forwards:
            await watch.pass_ticks(QUIET_TICKS)
        quiet = _periods(case, forwards, watch, count)
        watch.clear()
        timings = []
        with Forwards(case.module, case.clock) as forwards:
            for place in range(case.repeats):
                out = await engine.generate(**case.worded(1000 + place, 3), seed=place)
                timings.append(out.timings)
                await watch.pass_ticks(2)
        busy = _periods(case, forwards, watch, count)
    return {
        "residents": count,
        "came_and_went": len(timings),
        "encoded": bool(case.encoders and case.architecture.encoders),
        "encode_ms": 1000 * median([one.encode_s for one in timings]),
        "decode_ms": 1000 * median([one.decode_s for one in timings]),
        "decode_alone_ms": 1000 * warm.timings.decode_s,
        "quiet": quiet,
        "busy": busy,
    }


def _periods(case: Case, forwards: Forwards, watch: Watch, count: int) -> dict[str, Any]:
    """Median and longest, of device and engine. In a worker process no forward is seen."""
    _, periods = forwards.steady(count * case.architecture.rows)
    seen = {"engine": watch.periods(), "device": of_ticks(periods, case.architecture.calls_per_step)}
    return {
        side: {
            "median_ms": 1000 * median(found),
            "longest_ms": 1000 * max(found),
            "longest_over_median": max(found) / median(found),
            "ticks": len(found),
        }
        for side, found in seen.items()
        if found
    }
