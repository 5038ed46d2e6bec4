"""Measures a cost table: ticks of a real engine, at each size and number of requests."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from simulation.costs import CostTable, ShapeCosts
from steploom import AsyncDiffusionEngine, EngineConfig, EngineObserver
from steploom.demo import scene
from steploom.protocol import RunnerOutput, SchedulerOutput

SIZES = (32, 48, 64, 96)
REQUESTS = (1, 2, 4, 8, 16)
STEPS = 6


class Ticks(EngineObserver):
    """Notes what ticks took, without warm-up: steady ones by members, and a lone request's first and last.

    With ``cpu`` the process's CPU seconds since the tick before, else the tick's wall seconds in the worker.
    """

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self._since = time.process_time()
        self.steady: dict[int, list[float]] = {}
        self.first: list[float] = []
        self.last: list[float] = []
        self.rows = 1

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        now = time.process_time()
        seconds, self._since = now - self._since if self.cpu else result.seconds, now
        if result.warmup_s or not result.reports:
            return
        members, ends = len(result.reports), any(report.finished for report in result.reports)
        if not (output.scheduled_new_reqs or ends):
            self.steady.setdefault(members, []).append(seconds)
            self.rows = result.reports[0].rows
        elif members == 1:
            (self.last if ends else self.first).append(seconds)


async def measured(
    model: str, sizes: Sequence[int], rounds: int, tell: Callable[[str], None]
) -> tuple[CostTable, dict[str, Any]]:
    """The table of a model on this machine, and how it was measured.

    Each figure is the least of its rounds, which take turns: whatever else runs on the machine can only make a tick
    slower. For the same reason they are CPU seconds on a CPU, and more rows never take less than fewer. One torch
    thread, in process, ticks in which nobody joins or ends; encoding is what a lone request's first tick takes longer
    than a steady one, decoding what its last one does.
    """
    settings: dict[str, Any] = {"policy": "fcfs", "max_batch": max(REQUESTS), "run_ahead": False, "torch_threads": 1}
    config = EngineConfig(model=model, distributed_executor_backend="inproc", **settings)
    scenes, seen = numpy.random.default_rng(0), dict[int, Ticks]()
    async with AsyncDiffusionEngine(config) as engine:
        device = engine.info.device
        for turn in range(rounds + 1):  # The first is the warm-up.
            for size in sizes:
                ticks = seen[size] = seen[size] if turn > 1 else Ticks(device == "cpu")
                engine.observers.append(ticks)
                for many in REQUESTS:
                    await asyncio.gather(*(_generate(engine, size, scenes) for _ in range(many)))
                engine.observers.remove(ticks)
                tell(f"round {turn} of {rounds}, {size}x{size}")
    shapes = {(size, size): _costs(ticks) for size, ticks in seen.items()}
    name = f"{Path(model).name}-{device.partition(':')[0]}"
    about = {"rounds": rounds, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return CostTable(name, shapes, next(iter(seen.values())).rows), about


async def _generate(engine: AsyncDiffusionEngine, size: int, scenes: numpy.random.Generator) -> None:
    """One request, of a prompt that was hardly asked for before, so that it is encoded."""
    prompt = scene.prompt(scene.random_scene(scenes, pairs=1.0))
    await engine.generate(prompt, num_inference_steps=STEPS, width=size, height=size)


def _costs(ticks: Ticks) -> ShapeCosts:
    least = {many: min(seconds) for many, seconds in ticks.steady.items()}
    alone = least[1] = min(least.values())
    encode_s, decode_s = (max(0.0, min(seen) - alone) for seen in (ticks.first, ticks.last))
    known = tuple(
        (many * ticks.rows, round(min(seconds for more, seconds in least.items() if more >= many), 6))
        for many in REQUESTS
        if many in least
    )
    return ShapeCosts(known, round(encode_s, 6), round(decode_s, 6))
