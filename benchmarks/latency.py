"""Latency under load on the built-in model: the engine beside what applications do without one, in one run.

    python benchmarks/latency.py [--requests 600] [--rounds 3] [--loads 0.9] [--only lock,pool,static,inproc,mp]
                                 [--parts w1,burst,join] [--policy NAME] [--max-batch N] [--resume]

In each round the contestants take turns (forwards, then backwards in the next round) with the same requests: prompts,
seeds, sizes and arrival times. One torch thread each; ``pool`` has as many threads as there are cores. Times count from
when a request was due. ``baselines.py`` has the baselines, ``docs/benchmarking.md`` what the words mean.

``w1``     the design's W1 (32, 48, 64 and 96 pixels; 20, 20, 25 and 35 steps), Poisson at each of ``--loads`` of the
           serial capacity: the inverse of what ``pipe(...)`` alone takes on average, measured anew in each round. How
           busy the lock's thread then was says what the load really was, should the machine's speed have changed.
``burst``  the design's W4: 24 requests of 32x32 and 4 steps at once; seconds to the last image, beside what the bare
           merged forward plus decode of the same round allow at the best number of rows, and with text encoders added.
``join``   requests of one size at the knee (the least batch with 95% of the best throughput per request of the bare
           forward), Poisson at 0.5 of the serial capacity: join delays in steps, where a slot was free.

A round of 600 requests takes a contestant 600 / load times what a request takes alone: 11 minutes where that is 1 s.
How long the whole run takes is said when it begins (``--estimate`` says no more). Results are written after each
measurement; ``--resume`` goes on with the same options where a run was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import bare
import torch
from baselines import Locked, Pool, StaticBatches
from latency_summary import CONTESTANTS, median, show, summary

from steploom import AsyncDiffusionEngine, EngineConfig, demo
from steploom.cli.benches import standalone, workloads
from steploom.cli.benches.figures import figures, plain
from steploom.cli.benches.joins import Joins
from steploom.cli.benches.load import Load
from steploom.cli.benches.targets import Asking, EngineTarget
from steploom.cli.benches.workloads import Arrival

RESULTS = Path(__file__).parent / "results" / "latency.json"
PARTS = ("w1", "burst", "join")
BURST = workloads.w4(24, workloads.SMALL_SIZES[0], 4)
JOIN_SIZE, JOIN_LOAD = 64, 0.5
FEW = 100_000
"""More than a workload has requests: what lies between the indices of two, so that their prompts differ."""


class Contest:
    """The contestants, running, and what was measured so far.

    Args:
        options: The command's.
        pipe: The pipeline.
        targets: By name.
        engines: Of those that are engines.
        found: What an earlier run with these options has measured.
    """

    def __init__(
        self, options: argparse.Namespace, pipe: Any, targets: dict[str, Any], engines: dict[str, Any],
        found: dict[str, Any],
    ) -> None:  # fmt: skip
        self.options, self.pipe, self.targets, self.engines, self.found = options, pipe, targets, engines, found
        self.asking = asking_of(options)

    async def round(self, number: int) -> None:
        entry = self.found["rounds"].setdefault(str(number), {})
        shapes = workloads.w1(40, 1.0, self.options.seed, workloads.SMALL_SIZES)
        locked = Locked(self.pipe, self.asking)
        if "alone" not in entry:
            alone = await standalone.measure(locked, shapes, repeats=self.options.alone)
            entry["alone"] = [[*key, value] for key, value in alone.measured.items()]
        alone = standalone.Standalone({tuple(key): value for *key, value in entry["alone"]})
        capacity = entry["serial_capacity"] = 1 / alone.mean(shapes)
        print(f"round {number}: one at a time allows {capacity:.3f} requests/s", flush=True)
        self.tell_estimate(capacity)
        if self.options.estimate:
            return
        first = FEW * 100 * (1 + number)
        names = list(self.targets)[:: 1 if number % 2 == 0 else -1]
        if "w1" in self.options.parts:
            for place, load in enumerate(self.options.loads):
                seed, rate = self.options.seed + number, load * capacity
                arrivals = workloads.w1(self.options.requests, rate, seed, workloads.SMALL_SIZES)
                for name in names:
                    await self.once(entry, f"w1 {load:g}", name, arrivals, alone, first + (1 + place) * FEW)
        if "burst" in self.options.parts:
            await self.burst(entry, names, first)
        if "join" in self.options.parts and "join" not in entry:
            entry["join"] = await self.join(alone, self.options.seed + number)
            self.save()

    def tell_estimate(self, capacity: float) -> None:
        rounds = self.options.rounds - self.options.first_round
        seconds = sum(self.options.requests / (load * capacity) for load in self.options.loads)
        seconds *= rounds * len(self.targets) * ("w1" in self.options.parts)
        print(f"  {rounds} rounds of {len(self.targets)} contestants take about {seconds / 60:.0f} minutes", flush=True)

    async def once(
        self, entry: dict[str, Any], part: str, name: str, arrivals: list[Arrival], alone: standalone.Standalone,
        first: int,
    ) -> None:  # fmt: skip
        """One workload, one contestant. ``first``: so that no prompt is known from an earlier one."""
        done = entry.setdefault(part, {})
        if name in done:
            return
        gc.collect()
        joins = Joins(most_of(self.engines[name])) if name in self.engines else None
        if joins is not None:
            self.engines[name].observers.append(joins)
        load, busy = Load(self.targets[name], arrivals, first=first), getattr(self.targets[name], "busy_s", 0.0)
        await load.run()
        busy = getattr(self.targets[name], "busy_s", 0.0) - busy
        if joins is not None:
            self.engines[name].observers.remove(joins)
        row = figures(load.outcomes, load.duration_s, alone=alone, slo_multiple=self.options.slo_multiple)
        done[name] = {**row, **(joins.figures() if joins is not None else {}), "peak": load.peak}
        if busy:
            done[name]["busy_share"] = busy / load.duration_s
        self.save()
        print(f"  {part:8} {name:7} mean {row['mean_e2el_ms'] or 0:8.0f} ms  p99 {row['p99_e2el_ms'] or 0:8.0f} ms  "
              f"all in {load.duration_s:7.1f} s  attained {row['slo_attainment']:.1%}  failed {row['failed']}"
              + (f"  really busy {busy / load.duration_s:.0%}" if busy else ""), flush=True)  # fmt: skip

    async def burst(self, entry: dict[str, Any], names: list[str], first: int) -> None:
        """W4 some times, with the ceiling measured before and after each, as the machine is then."""
        arguments = {**self.asking.params, "width": BURST[0].width, "height": BURST[0].height}
        bound = await asyncio.to_thread(bare.Ceiling, self.pipe, arguments, len(BURST), BURST[0].steps)
        done = entry.setdefault("burst", {})
        for name in [name for name in names if name not in done]:
            runs: list[dict[str, float]] = []
            for again in range(self.options.bursts):
                before = await asyncio.to_thread(bound.measure)
                load = Load(self.targets[name], BURST, first=first + again * len(BURST))
                await load.run()
                after = await asyncio.to_thread(bound.measure)
                ceiling = {key: (before[key] + after[key]) / 2 for key in before}
                runs.append({"last_image_s": load.duration_s, "failed": load.failed, **ceiling})
            done[name] = runs
            best, most = (median(run[key] for run in runs) for key in ("last_image_s", "seconds"))
            times = median(run["last_image_s"] / run["seconds"] for run in runs)
            print(f"  burst    {name:7} last image after {best:.3f} s; bare merged forward and decode: {most:.3f} s "
                  f"({times:.2f} times)", flush=True)  # fmt: skip
            self.save()

    async def join(self, alone: standalone.Standalone, seed: int) -> dict[str, Any]:
        """Join delays of an engine whose batch is as large as the knee, one size."""
        arguments = {**self.asking.params, "width": JOIN_SIZE, "height": JOIN_SIZE}
        knee, costs = await asyncio.to_thread(bare.knee, self.pipe, arguments)
        steps = dict(zip(workloads.SMALL_SIZES, workloads.STEPS, strict=True))[JOIN_SIZE]
        rate = JOIN_LOAD / alone.seconds(Arrival(0, JOIN_SIZE, JOIN_SIZE, steps))
        times = workloads.poisson(min(self.options.requests, self.options.join_requests), rate, seed)
        config = config_of(self.options, max_batch=knee, max_resident=2 * knee)
        async with AsyncDiffusionEngine(config) as engine:
            target = EngineTarget(engine, self.asking)
            await warm_up(target, [JOIN_SIZE])
            joins = Joins(knee)
            engine.observers.append(joins)
            load = Load(target, [Arrival(at, JOIN_SIZE, JOIN_SIZE, steps) for at in times])
            await load.run()
        found = {"knee": knee, "bare_s_per_request": costs, **joins.figures()}
        print(f"  join     knee {knee}: p99 join delay {found['p99_join_delay_steps_slot_free']} steps of others, of "
              f"{found['joins_with_slot_free']} who found a slot free", flush=True)  # fmt: skip
        return found

    def save(self) -> None:
        self.found["summary"] = summary(self.found["rounds"])
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(plain(self.found), indent=1) + "\n")


def asking_of(options: argparse.Namespace) -> Asking:
    return Asking(options.seed, None, {"max_sequence_length": options.text})


def config_of(options: argparse.Namespace, **settings: Any) -> EngineConfig:
    given = {"max_waiting": max(1024, 2 * options.requests), "torch_threads": 1, **dict(options.engine)}
    if options.policy is not None:
        given["policy"] = options.policy
    if options.max_batch is not None:
        given["max_batch"] = int(options.max_batch) if options.max_batch.isdecimal() else options.max_batch
    return EngineConfig(**{**given, **settings})


def most_of(engine: AsyncDiffusionEngine) -> int | None:
    most: Any = engine.config.max_batch
    return most if isinstance(most, int) else None


async def warm_up(target: Any, sizes: list[int], each: int = 4) -> None:
    """Merges are learned and verified before anything is measured. Numbers of steps differ, so that timesteps do."""
    async with asyncio.TaskGroup() as group:
        for place, size in enumerate(size for size in sizes for _ in range(each)):
            group.create_task(target.send(2_000_000 + place, Arrival(0, size, size, 2 + place % 3)))


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    asking = asking_of(options)
    async with contextlib.AsyncExitStack() as stack:
        made: dict[str, Any] = {
            "lock": lambda: Locked(pipe, asking),
            "pool": lambda: Pool(pipe, asking),
            "static": lambda: StaticBatches(pipe, asking, options.static_batch),
        }
        targets: dict[str, Any] = {}
        engines: dict[str, Any] = {}
        for name in options.only:
            if name in made:
                targets[name] = await stack.enter_async_context(made[name]())
                continue
            backend = "inproc" if name == "inproc" else "mp"
            config = config_of(options, distributed_executor_backend=backend)
            engines[name] = await stack.enter_async_context(AsyncDiffusionEngine(config))
            targets[name] = EngineTarget(engines[name], asking)
        for target in targets.values():
            await warm_up(target, list(workloads.SMALL_SIZES))
            await warm_up(target, [BURST[0].width], len(BURST))
        contest = Contest(options, pipe, targets, engines, begun(options, engines))
        for number in range(options.first_round, options.rounds):
            await contest.round(number)
            if options.estimate:
                break
    return contest.found


def begun(options: argparse.Namespace, engines: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run has measured, if it had the same options; else nothing but about the machine."""
    told = {name: value for name, value in vars(options).items()
            if name not in ("out", "resume", "rounds", "first_round", "estimate", "only", "parts")}  # fmt: skip
    told = json.loads(json.dumps(told))
    if options.resume and options.out.exists():
        found = json.loads(options.out.read_text())
        if found["options"] != told:
            raise SystemExit(f"--resume: {options.out} was measured with other options: {found['options']}")
        return found
    config = next(iter(engines.values())).config if engines else EngineConfig()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "options": told,
        "engine": {"policy": str(config.policy), "max_batch": config.max_batch, "run_ahead": config.run_ahead},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "python": platform.python_version(), "load_before": os.getloadavg()},
        "versions": versions,
        "rounds": {},
    }  # fmt: skip


def several(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def read() -> argparse.Namespace:
    from steploom.cli.arguments import engine_setting

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="from 0; with --resume: another piece")
    parser.add_argument("--loads", type=lambda text: [float(part) for part in several(text)], default=[0.9])
    parser.add_argument("--only", type=several, default=list(CONTESTANTS), help="of " + ",".join(CONTESTANTS))
    parser.add_argument("--parts", type=several, default=list(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--policy")
    parser.add_argument("--max-batch", help="of the engines (default: EngineConfig's)")
    parser.add_argument("--engine", type=engine_setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--static-batch", type=int, default=16, help="requests of a static batch, at most")
    parser.add_argument("--slo-multiple", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=int, default=5, help="how often each size runs alone in a round")
    parser.add_argument("--bursts", type=int, default=3, help="how often W4 is sent in a round")
    parser.add_argument("--join-requests", type=int, default=100)
    parser.add_argument("--text", type=int, default=16, help="max_sequence_length, as in throughput.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and stop")
    options = parser.parse_args()
    for given, known in ((options.only, CONTESTANTS), (options.parts, PARTS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: must be of {', '.join(known)}")
    return options


def main() -> None:
    options = read()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = asyncio.run(measure(options))
    if not options.estimate:
        show(found)


if __name__ == "__main__":
    main()
