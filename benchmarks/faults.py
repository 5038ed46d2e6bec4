"""What a fault, an abort and a call cost: a worker killed under load, an abort with nobody else, a call between ticks.

    python benchmarks/faults.py [--rounds 3] [--requests 16] [--aborts 40] [--calls 200] [--save]

One engine with the built-in model and one worker process of one torch thread. All in one run:

- *kill*: so many requests at once, undisturbed and then with a ``kill -9`` of the worker when they are half done, in
  turns. All must finish with the pictures of the undisturbed round (within one grey level). What comes after the kill
  is stated beside what is allowed: one start of a worker plus the first round of a fresh one, measured in this run.
- *abort*: of the only request, from the call to the worker's answer that it holds nobody; what it was doing then, a
  step, is stated beside.
- *call*: ``collective_rpc("ping")`` while requests run, beside the ticks of that time.

``--save`` writes ``benchmarks/results/faults.json``.
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

import anyio
import numpy as np
import psutil

from steploom import AsyncDiffusionEngine, DiffusionOutput, EngineConfig, RequestCancelled, StepEvent

RESULTS = Path(__file__).parent / "results" / "faults.json"
ASKED = {"num_inference_steps": 20, "max_sequence_length": 16}


def _config() -> EngineConfig:
    return EngineConfig(max_batch=16, torch_threads=1, costs_file=None)


def worker() -> psutil.Process:
    """The worker's process."""
    found = [one for one in psutil.Process().children() if "steploom.worker" in one.cmdline()]
    return found[-1]


async def many(engine: AsyncDiffusionEngine, count: int, kill: bool) -> tuple[list[DiffusionOutput], float, float]:
    """Serves requests that come at once; returns their outputs, the seconds in all, and those after the kill."""
    began, killed = time.perf_counter(), 0.0

    async def one(seed: int) -> DiffusionOutput:
        nonlocal killed
        async with engine.stream(f"a large red circle, {seed}", seed=seed, **ASKED) as run:
            async for event in run:
                half_done = isinstance(event, StepEvent) and event.step >= ASKED["num_inference_steps"] // 2
                if kill and not killed and half_done:
                    killed = time.perf_counter()
                    worker().kill()
            return await run.result()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(seed)) for seed in range(count)]
    ended = time.perf_counter()
    return [task.result() for task in tasks], ended - began, ended - killed


def apart(ones: list[DiffusionOutput], others: list[DiffusionOutput]) -> int:
    """The largest difference between pictures of the same request, in grey levels."""
    pairs = ((np.asarray(a.images[0], int), np.asarray(b.images[0], int)) for a, b in zip(ones, others, strict=True))
    return max(int(np.abs(a - b).max()) for a, b in pairs)


async def fresh(count: int) -> tuple[float, float]:
    """Seconds that an engine with its worker and model takes to start, and then its first round."""
    began = time.perf_counter()
    async with AsyncDiffusionEngine(_config()) as engine:
        started = time.perf_counter() - began
        _, first, _ = await many(engine, count, kill=False)
        return started, first


async def kills(engine: AsyncDiffusionEngine, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds without and with a kill, in turns."""
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds):
        start_s, first_s = await fresh(options.requests)
        usual, usual_s, _ = await many(engine, options.requests, kill=False)
        replayed, _, after_s = await many(engine, options.requests, kill=True)
        rounds.append({"after_the_kill_s": after_s, "start_s": start_s, "first_round_s": first_s,
                       "allowed_s": start_s + first_s, "warm_round_s": usual_s,
                       "grey_levels": apart(usual, replayed)})  # fmt: skip
    return {"requests": options.requests, "rounds": rounds}


async def aborts(engine: AsyncDiffusionEngine, count: int) -> dict[str, Any]:
    """Aborts of the only request, each in another step of it."""
    freed: list[float] = []
    steps: list[float] = []
    for number in range(count):
        async with engine.stream("a small blue square", num_inference_steps=500, max_sequence_length=16) as run:
            at: list[float] = []
            async for event in run:
                at.append(time.perf_counter())
                if isinstance(event, StepEvent) and event.step >= 3 + number % 7:
                    break
            await anyio.sleep((number % 10) / 10 * (at[-1] - at[-2]))  # anywhere in a step
            began = time.perf_counter()
            await engine.abort(run.request_id)
            while (await engine.collective_rpc("stats", timeout=60, unique_reply_rank=0)).resident:
                pass
            freed.append(time.perf_counter() - began)
            steps.append(at[-1] - at[-2])
            try:
                await run.result()
            except RequestCancelled:
                continue
            raise AssertionError("the aborted request finished")
    return {"freed_ms": _spread(freed), "step_ms": _spread(steps)}


async def calls(engine: AsyncDiffusionEngine, count: int) -> dict[str, Any]:
    """Calls while eight requests run, and the ticks of that time."""
    trips: list[float] = []
    at: list[float] = []
    running = anyio.Event()

    async def run_on(seed: int) -> None:
        async with engine.stream("a green star", seed=seed, num_inference_steps=1000, max_sequence_length=16) as run:
            async for event in run:
                if isinstance(event, StepEvent) and seed == 0:
                    at.append(time.perf_counter())
                    running.set() if event.step >= 20 else None

    async with anyio.create_task_group() as group:
        for seed in range(8):
            group.start_soon(run_on, seed)
        await running.wait()
        at.clear()
        for number in range(count):
            began = time.perf_counter()
            await engine.collective_rpc("ping", timeout=60, unique_reply_rank=0)
            trips.append(time.perf_counter() - began)
            await anyio.sleep(0.001 * (number % 13))  # at any moment of a tick
        group.cancel_scope.cancel()
    ticks = np.diff(at).tolist()
    return {"round_trip_ms": _spread(trips), "tick_ms": _spread(ticks)}


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median, 90th percentile and maximum, in milliseconds."""
    of = {"median": statistics.median(seconds), "p90": float(np.quantile(seconds, 0.9)), "most": max(seconds)}
    return {name: round(1000 * value, 2) for name, value in of.items()}


def _tell(found: dict[str, Any]) -> None:
    for one in found["kill"]["rounds"]:
        print(
            f"kill -9 with {found['kill']['requests']} requests running: all finished {one['after_the_kill_s']:.2f} s "
            f"later; a start ({one['start_s']:.2f}) and a first round ({one['first_round_s']:.2f}) allow "
            f"{one['allowed_s']:.2f}, a warm round takes {one['warm_round_s']:.2f}; pictures {one['grey_levels']} grey "
            "levels apart"
        )
    for name, what, beside in (("abort", "freed_ms", "step_ms"), ("call", "round_trip_ms", "tick_ms")):
        told = [" ".join(f"{key} {value}" for key, value in found[name][one].items()) for one in (what, beside)]
        print(f"{name}: {what} {told[0]}; {beside} {told[1]}")


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All three, with one engine."""
    async with AsyncDiffusionEngine(_config()) as engine:
        await many(engine, options.requests, kill=False)
        aborted = await aborts(engine, options.aborts)
        called = await calls(engine, options.calls)
        return {"abort": aborted, "call": called, "kill": await kills(engine, options)}


def main() -> None:
    """Measures, prints, and saves if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--aborts", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "python": platform.python_version(), "load_before": os.getloadavg()}  # fmt: skip
    found = asyncio.run(measure(options))
    _tell(found)
    if options.save:
        told = {name: value for name, value in vars(options).items() if name != "save"}
        RESULTS.write_text(json.dumps({"options": told, "machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
