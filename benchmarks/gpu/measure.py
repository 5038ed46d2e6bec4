"""One case from the bare forward to the engine in another process, the most telling figures first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from gpu import models, serving
from gpu.case import Case
from gpu.forwards import Table, captured, flops_of
from gpu.machine import free_bytes, median
from gpu.watch import Watch
from steploom import AsyncDiffusionEngine, EngineConfig

PAYS = 1.1
"""Gain of the bare merged forward from which sharing is worth it for throughput."""

RESERVE_BYTES = 6_000_000_000
"""For activations, beside the weights of a model of real size."""

START_S = 25.0
"""Until a worker process has imported everything and made a model of real size, about."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def needed_bytes(name: str, *, tiny: bool, dtype: str, encoders: bool) -> int:
    """Memory of the model with its activations, about."""
    sizes = models.parameters_of(name, tiny)
    counted = sum(count for part, count in sizes.items() if encoders or "text_encoder" not in part)
    return int(1.02 * counted * _BYTES[dtype]) + (0 if tiny else RESERVE_BYTES)


async def measure(case: Case, rows: tuple[int, ...], figures: dict[str, Any], *, peak: float, mp: bool) -> None:
    """Fills ``figures``, step by step, so that what is there when it is interrupted can be kept."""
    table = _bare(case, rows, figures, peak)
    if not table.times:
        return
    each = case.architecture.rows
    counts = [count // each for count in rows if count in table.times and count % each == 0]
    order = _by_importance(counts, figures["bare"]["knee_rows"] // each)
    engines = figures["engine"] = {}
    watch = Watch()
    engine = AsyncDiffusionEngine.from_pipeline(case.pipe, max_batch=max(counts) + 1, **case.engine_options)
    engine.observers.append(watch)
    async with engine:
        for count in order:
            if case.budget.allows(case.label, f"engine with {count} requests", _cost(case, table, count)):
                engines[str(count)] = await serving.throughput(case, engine, table, count)
                _tell(case, count, engines[str(count)])
        count = _affordable(case, table, counts, 10 * case.repeats + 15)
        if count is None:
            case.budget.leave_out(case.label, "join and cancel delay", "no time left for it")
        else:
            figures["delays"] = await serving.delays(case, engine, watch, count)
        count = _affordable(case, table, counts, 7 * case.repeats + serving.QUIET_TICKS + 10)
        if count is None:
            case.budget.leave_out(case.label, "gaps between ticks", "no time left for it")
        else:
            figures["gaps"] = await serving.gaps(case, engine, watch, count)
        figures["engine_mfu"] = _utilisation(figures, case, peak)
    expected = (0 if case.tiny else START_S) + 20 * case.repeats * _tick(case, table, min(counts))
    if mp and case.budget.allows(case.label, "worker process", expected):
        await _in_process(case, table, counts, figures)


def _bare(case: Case, rows: tuple[int, ...], figures: dict[str, Any], peak: float) -> Table:
    """The ceiling: knee, MFU and whether batching pays."""
    given = {key: value for key, value in case.request(0).items() if key not in ("num_inference_steps", "output_type")}
    call = captured(case.pipe, case.module, given)
    if case.attention is not None:  # kernels that the counter does not know
        case.module.set_attention_backend("native")
    flops = flops_of(case.module, call, case.architecture.rows)
    if case.attention is not None:
        case.module.set_attention_backend(case.attention)
    table = Table(case.module, call, case.architecture.rows, case.clock)
    table.fill(case.label, case.budget, rows)
    if table.times:
        figures["bare"] = table.figures(flops, peak)
        gain = max(row["gain"] for row in figures["bare"]["rows"].values())
        figures["bare"] |= {"best_gain": gain, "batching_pays": gain >= PAYS}
        times = "  ".join(f"{n}: {row['step_ms']:.1f} ms" for n, row in figures["bare"]["rows"].items())
        print(f"  {case.label}: bare forward by rows  {times}  best gain {gain:.2f}", flush=True)
    return table


def _by_importance(counts: list[int], knee: int) -> list[int]:
    """The knee first, then the most, then the others upwards."""
    first = [count for count in (max(1, knee), max(counts)) if count in counts]
    return list(dict.fromkeys([*first, *counts]))


def _tick(case: Case, table: Table, count: int) -> float:
    """Seconds of a tick of that many requests, about."""
    return table.seconds(count * case.architecture.rows) * case.architecture.calls_per_step


def _cost(case: Case, table: Table, count: int) -> float:
    """Seconds that :func:`gpu.serving.throughput` takes, about: turns, and verification before them."""
    alone, together = _tick(case, table, 1), _tick(case, table, count)
    return case.rounds * (case.steps + 2) * (alone + together) + 8 * together


def _affordable(case: Case, table: Table, counts: list[int], ticks: int) -> int | None:
    """The most requests whose ticks fit into half of the time that is left; None if not even one's do."""
    fitting = [count for count in counts if ticks * _tick(case, table, count) <= case.budget.left / 2]
    return max(fitting, default=None)


def _utilisation(figures: dict[str, Any], case: Case, peak: float) -> dict[str, float]:
    """MFU of the engine by requests: everything that is not a forward counts against it."""
    per_request = figures["bare"]["flops_per_row"] * case.architecture.rows * case.architecture.calls_per_step
    return {
        count: per_request * case.steps / one["engine_s"] / peak for count, one in figures.get("engine", {}).items()
    }


async def _in_process(case: Case, table: Table, counts: list[int], figures: dict[str, Any]) -> None:
    """The same over a worker process, which has a copy of the model of its own."""
    needed = needed_bytes(case.name, tiny=case.tiny, dtype=case.dtype, encoders=False)
    if free_bytes(case.device) is not None:
        torch.cuda.empty_cache()
    free = free_bytes(case.device)
    if free is not None and free < needed:
        why = f"a second copy needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        case.budget.leave_out(case.label, "worker process", why)
        return
    choice = {"name": case.name, "tiny": case.tiny, "device": case.device, "dtype": case.dtype, "encoders": False}
    os.environ[models.CHOICE] = json.dumps(choice)
    folder = str(Path(__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, paths)])
    count = _affordable(case, table, counts, 20 * case.repeats) or 1
    config = EngineConfig(
        model="gpu.models:made", device=case.device, max_batch=max(counts) + 1, torch_threads=1,
        compile=case.compiled, attention_backend=case.attention, **case.engine_options,
    )  # fmt: skip
    engine, watch = AsyncDiffusionEngine(config), Watch()
    engine.observers.append(watch)
    async with engine:
        requests = [case.request(seed) for seed in range(count)]
        await serving.wave(case, engine, [{**one, "num_inference_steps": 3} for one in requests])
        turns, idle = [], []
        for _ in range(case.rounds):
            alone, _ = case.alone(requests[:1], [0])
            watch.clear()
            together, _ = await serving.wave(case, engine, requests)
            turns.append(alone / together)
            idle += watch.idle()
        figures["worker_process"] = {
            "requests": count,
            "gain": median(turns),
            "idle_between_ticks_ms": 1000 * median(idle),
            "delays": await serving.delays(case, engine, watch, count),
        }


def _tell(case: Case, count: int, one: dict[str, Any]) -> None:
    print(
        f"  {case.label}: {count} requests: {one['images_per_s']:.2f}/s, {one['gain']:.2f} times pipe(...) = "
        f"{one['share_of_ceiling']:.0%} of the ceiling; {one.get('outside_share', float('nan')):.1%} outside forwards",
        flush=True,
    )
