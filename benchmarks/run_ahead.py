"""Run-ahead on and off, alternating in one run: how long the worker waits between two ticks.

    python benchmarks/run_ahead.py [--requests 24] [--steps 20] [--rounds 5] [--tick-ms 2] [--model demo] [--json FILE]

Over ``mp``, with the demo model at 32x32 (``--model none`` leaves it out) and with a pretended model whose tick takes
``--tick-ms``, one torch thread. Two engines of each kind are up, one with ``run_ahead=False``; in each round both do
the same requests, of different step counts, so that some join and leave all the time. Figures are medians over rounds.

``gap_us``   from the end of a tick to the beginning of the next one in the worker, per tick, with programs resident.
``idle_us``  of this, the worker waited for a message of the engine.
``seconds``  for all requests.
``ticks``    in the worker; ``mates`` how many requests shared a denoiser call on average.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

from steploom import AsyncDiffusionEngine, EngineConfig
from steploom.executor import MultiprocExecutor
from steploom.protocol import PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput, WorkerStats


class Pretended:
    """A runner whose tick takes ``model`` milliseconds, whoever takes part."""

    info = PipelineInfo(pipeline_class="Pretended")

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._programs: dict[str, tuple[int, int]] = {}
        self._stats = WorkerStats()

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        until = time.perf_counter() + self._tick_s
        for run in output.finished_req_ids:
            self._programs.pop(run, None)
        for new in output.scheduled_new_reqs:
            self._programs[new.run_id] = (0, new.request.params["num_inference_steps"])
        here = [run for run in output.run_ids if run in self._programs]
        reports = [self._step(run, len(here)) for run in here]
        while time.perf_counter() < until:
            pass
        self._stats.ticks += 1
        return RunnerOutput(tick=output.tick, reports=reports)

    def _step(self, run: str, mates: int) -> RequestReport:
        done, total = self._programs[run]
        self._programs[run] = (done + 1, total)
        finished = done + 1 == total
        if finished:
            del self._programs[run]
        return RequestReport(
            run_id=run, phase="denoise", stepped=True, step=done + 1, total_steps=total, batch_key="pretended",
            batch_requests=float(mates), finished=finished,
        )  # fmt: skip

    def call(self, method: str, args: Any, kwargs: Any) -> Any:
        return self._stats if method == "stats" else None

    def close(self) -> None:
        pass


def make(config: EngineConfig, progress: Callable[[str], None]) -> Pretended:
    """Called in the worker."""
    return Pretended(float(config.model) / 1000)


class PretendedExecutor(MultiprocExecutor):
    """Worker processes without a model."""

    runner = "run_ahead:make"


async def one_round(engine: AsyncDiffusionEngine, options: argparse.Namespace) -> dict[str, float]:
    size = {"height": 32, "width": 32} if engine.config.model == "demo" else {}
    before = await engine.collective_rpc("stats", unique_reply_rank=0)
    gap, idle, ticks, started = before.gap_s, before.idle_s, before.ticks, time.perf_counter()
    calls = [
        engine.generate(f"a red circle {i}", seed=i, num_inference_steps=options.steps - i % 7, **size)
        for i in range(options.requests)
    ]
    outputs = await asyncio.gather(*calls)
    seconds = time.perf_counter() - started
    after = await engine.collective_rpc("stats", unique_reply_rank=0)
    done = after.ticks - ticks
    return {
        "gap_us": (after.gap_s - gap) / done * 1e6,
        "idle_us": (after.idle_s - idle) / done * 1e6,
        "seconds": seconds,
        "ticks": done,
        "mates": statistics.mean(out.timings.mean_batch_requests for out in outputs),
    }


async def compare(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Rounds of both, taking turns; who is first takes turns too."""
    rounds: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    async with AsyncExitStack() as stack:
        engines: dict[str, AsyncDiffusionEngine] = {}
        for name in rounds:
            settings = EngineConfig(**config, run_ahead=name == "on", max_batch=options.batch, torch_threads=1)
            engines[name] = await stack.enter_async_context(AsyncDiffusionEngine(settings))
            await one_round(engines[name], options)  # probing and verification
        for turn in range(options.rounds):
            for name in sorted(rounds, reverse=turn % 2 == 0):
                rounds[name].append(await one_round(engines[name], options))
    medians = {
        name: {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
        for name, rows in rounds.items()
    }
    return {"medians": medians, "rounds": rounds}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {
        "pretended": {"model": str(options.tick_ms), "distributed_executor_backend": PretendedExecutor}
    }
    if options.model != "none":
        kinds[options.model] = {"model": options.model}
    for name, config in kinds.items():
        result[name] = await compare(options, config)
        for ahead, row in result[name]["medians"].items():
            print(f"{name:<12}{ahead:<5}" + "  ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)
    return result


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "diffusers", "pyzmq", "msgspec")}
    cpu = platform.processor() or platform.machine()
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "python": platform.python_version(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tick-ms", type=float, default=2.0, help="of the pretended model (default: %(default)s)")
    parser.add_argument("--model", default="demo", help="another one beside the pretended; none for no other")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {**asyncio.run(measure(options)), "machine": machine(), "options": {**vars(options), "json": None}}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
