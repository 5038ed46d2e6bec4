"""``steploom bench serve``: a workload against a server or an engine, at its own pace whatever they do."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.cli.benches import bench_options, workloads
from steploom.cli.benches.workloads import Arrival
from steploom.errors import ConfigError

if TYPE_CHECKING:
    from steploom.cli.benches.joins import Joins
    from steploom.cli.benches.load import Load, Target
    from steploom.cli.benches.standalone import Standalone

WORKLOADS = ("poisson", "gamma", "trace", "burst", "W1", "W2", "W3", "W4")
REQUESTS = {"burst": 24, "W4": 24}
"""How many requests a workload has by itself; others have 100."""
LOAD = 0.9
"""Share of the serial capacity where neither --rate nor --load is given."""

_EXAMPLES = """
examples:
  the engine and the built-in model, four sizes, at 0.9 of what one request at a time would allow
    steploom bench serve --workload W1 --load 0.9 --requests 200
  a server that runs, ten requests a second, for as long as 300 requests take
    steploom bench serve --url http://127.0.0.1:8000 --rate 10 --requests 300 --size 64
  bursts, with previews, a policy and figures for a spreadsheet
    steploom bench serve --workload gamma --cv 3 --previews --policy fcfs --json figures.json
  a trace of arrivals, users, steps and images (columns as in docs/benchmarking.md)
    steploom bench serve --workload trace --trace day.csv --rate 2 --requests 500

Requests are sent at the times that the workload says, answered or not (an open loop). First each size is sent alone,
some times in turn: slowdown and attainment are by that, and so is --load. Ctrl-C prints what there is so far.
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``bench serve`` to ``steploom bench``."""
    summary = "latency under load: a workload's requests, sent at their times"
    parser = arguments.add_command(commands, "serve", run, summary=summary, examples=_EXAMPLES)
    group = parser.add_argument_group("the workload")
    group.add_argument("--workload", type=_workload, choices=WORKLOADS, default="poisson",
                       help="poisson, gamma: arrivals; trace: a CSV; burst: all at once; W1 to W4: those of the "
                       "project's figures (default: poisson)")  # fmt: skip
    group.add_argument("--requests", type=arguments.count, metavar="N", help="(default: 100; a burst's: 24)")
    group.add_argument("--rate", type=arguments.rate, metavar="R", help="requests a second, on average")
    group.add_argument("--load", type=arguments.rate, metavar="SHARE",
                       help="or that share of what one request at a time would allow, which is measured first "
                       f"(default: {LOAD})")  # fmt: skip
    group.add_argument("--cv", type=arguments.patience, default=workloads.BURSTY_CV, metavar="X",
                       help="gamma: how uneven the gaps are; 1 is Poisson (default: %(default)s)")  # fmt: skip
    group.add_argument("--trace", metavar="FILE", help="the CSV of trace and W3")
    bench_options.add_request_options(parser)
    parser.add_argument("--previews", action="store_true", help="ask for previews, and time the first")
    parser.add_argument("--concurrency-limit", type=arguments.count, metavar="N",
                        help="requests in flight at most; the others wait in the client, which counts")  # fmt: skip
    parser.add_argument("--slo-multiple", type=arguments.rate, default=5.0, metavar="X",
                        help="a request attains its objective within so many times what it takes alone "
                        "(default: 5)")  # fmt: skip
    parser.add_argument("--alone", type=bench_options.no_or_count, default=3, metavar="N",
                        help="how often each size is sent alone first; 0 needs --rate, and has no slowdowns "
                        "(default: %(default)s)")  # fmt: skip
    bench_options.add_target_options(parser)


def _workload(text: str) -> str:
    return text.upper() if text.lower() in ("w1", "w2", "w3", "w4") else text.lower()


def workload(options: argparse.Namespace, rate: float) -> list[Arrival]:
    """The requests that the options ask for.

    Args:
        options: The parsed ones.
        rate: Requests a second.

    Raises:
        ConfigError: The trace is missing or wrong.
    """
    name, seed = options.workload, options.seed
    n = options.requests or REQUESTS.get(name, 100)
    if name in ("trace", "W3"):
        if options.trace is None:
            raise ConfigError(f"--workload {name}: needs --trace FILE, a CSV with arrival_s and num_inference_steps")
        found = workloads.w3(options.trace, n, seed, rate, bench_options.sizes_of(options, (512, 1024)))
    elif name in ("W1", "W2"):
        make = workloads.w1 if name == "W1" else workloads.w2
        found = make(n, rate, seed, bench_options.sizes_of(options))
    else:
        times = {"poisson": workloads.poisson, "gamma": _gamma(options.cv)}.get(name, _burst)(n, rate, seed)
        pixels = bench_options.sizes_of(options, (512,))
        steps = options.steps or (4 if name == "W4" else 20)
        dealt = workloads.deal(pixels, [1.0] * len(pixels), n, seed)
        return [Arrival(at, size, size, steps) for at, size in zip(times, dealt, strict=True)]
    return found if options.steps is None else [_with_steps(one, options.steps) for one in found]


def _gamma(cv: float) -> Callable[[int, float, int], list[float]]:
    return lambda n, rate, seed: workloads.gamma(n, rate, cv, seed)


def _burst(n: int, rate: float, seed: int) -> list[float]:
    return [0.0] * n


def _with_steps(one: Arrival, steps: int) -> Arrival:
    return dataclasses.replace(one, steps=steps)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom bench serve``."""
    _check(options)
    bench = _Bench(options)
    bench_options.conduct(bench)
    return 0 if any(one.error is None for one in bench.outcomes) else 1


def _check(options: argparse.Namespace) -> None:
    """Refuses what does not go together, before any work.

    Raises:
        ConfigError: It says what.
    """
    if options.rate is not None and options.load is not None:
        raise ConfigError(f"--rate {options.rate:g} with --load {options.load:g}: give one of them")
    if options.plain and (options.steps is not None or options.extra):
        raise ConfigError("--plain with --steps or --set: OpenAI has no such fields; leave one out")
    burst = options.workload in REQUESTS
    if options.alone == 0 and options.rate is None and not burst:
        raise ConfigError("--alone 0: the load is a share of what requests take alone; give --rate instead")
    bench_options.check_json(options)
    workload(options, 1.0)  # a trace that cannot be read is not worth a model's loading


class _Bench:
    """One run of the command.

    Attributes:
        load: The workload on its way; None before.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.load: Load | None = None
        self.rate = math.inf
        self.alone: Standalone | None = None
        self.joins: Joins | None = None
        self.settings: dict[str, Any] = {}

    @property
    def outcomes(self) -> list[Any]:
        return self.load.outcomes if self.load is not None else []

    async def measure(self) -> None:
        """Starts, warms up, measures requests alone, then sends the workload."""
        from rich.console import Console

        from steploom.cli.benches.load import Load

        options = self.options
        with Console(stderr=True).status("starting") as status:
            async with bench_options.measured(options) as (target, engine):
                await self._prepare(target, status)
                requests = workload(options, self.rate)
                self.joins = bench_options.watch(engine)
                if engine is not None:
                    self.settings = {name: getattr(engine.config, name) for name in ("model", "policy", "max_batch")}
                status.stop()
                with bench_options.progress(options.workload, len(requests)) as told:
                    self.load = Load(
                        target, requests, limit=options.concurrency_limit, timeout_s=options.timeout, on_change=told
                    )
                    await self.load.run()

    async def _prepare(self, target: Target, status: Any) -> None:
        from steploom.cli.benches import standalone

        options, shapes = self.options, workload(self.options, 1.0)
        if options.warm_up:
            status.update("warming up")
            await bench_options.warm_up(target, shapes, options.warm_up)
        if options.alone:
            status.update("measuring each size alone")
            self.alone = await standalone.measure(target, shapes, repeats=options.alone)
        if options.rate is not None:
            self.rate = options.rate
        elif self.alone is not None and options.workload not in REQUESTS:
            self.rate = (options.load or LOAD) / self.alone.mean(shapes)

    def figures(self) -> dict[str, Any]:
        """All that is known so far, as ``--json`` writes it."""
        from steploom.cli.benches.figures import figures

        options, load = self.options, self.load
        assert load is not None
        found = figures(load.outcomes, load.duration_s, alone=self.alone, slo_multiple=options.slo_multiple)
        watched = self.joins.figures() if self.joins is not None else {}
        capacity = 1 / self.alone.mean([one for _, one in load.arrivals]) if self.alone is not None else None
        return {
            **bench_options.about(options, self.settings),
            "workload": options.workload,
            "num_prompts": len(load.arrivals),
            "request_rate": self.rate,
            "serial_capacity": capacity,
            "load": self.rate / capacity if capacity else None,
            "max_concurrency": options.concurrency_limit,
            "max_concurrent_requests": load.peak,
            **{key: value for key, value in found.items() if not key.startswith("by_")},
            **watched,
            "by_class": found["by_class"],
            "by_user": found["by_user"],
        }

    def tell(self, *, interrupted: bool = False) -> None:
        """Writes and prints the figures."""
        found = {**self.figures(), "interrupted": interrupted}
        if bench_options.write(self.options, found):
            from steploom.cli.benches.bench_table import show

            show(found, "Serving Benchmark Result")
