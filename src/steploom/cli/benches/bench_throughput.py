"""``steploom bench throughput``: how many images a second, when there is always another request."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.cli.benches import bench_options, workloads
from steploom.cli.benches.workloads import Arrival

if TYPE_CHECKING:
    from steploom.cli.benches.joins import Joins
    from steploom.cli.benches.load import Load, Target

_EXAMPLES = """
examples:
  the built-in model, 64 requests at once, beside one at a time
    steploom bench throughput --baseline
  a model of your own, never more than 16 at a time
    steploom bench throughput --model ./my-flux --size 512 --steps 28 --concurrency 16
  a server that runs, figures as JSON
    steploom bench throughput --url http://127.0.0.1:8000 --size 64 --requests 128 --json -

Requests differ in prompt and seed. --baseline sends as many as --baseline-requests says one after the other, half of
them before and half of them after, to the same engine or server.
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``bench throughput`` to ``steploom bench``."""
    summary = "images a second, all requests at once"
    parser = arguments.add_command(commands, "throughput", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument("--requests", type=arguments.count, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=arguments.count, metavar="N",
                        help="in flight at most; the next is sent when one is done (default: all)")  # fmt: skip
    parser.add_argument("--baseline", action="store_true", help="measure one at a time too, in the same run")
    parser.add_argument("--baseline-requests", type=arguments.count, default=8, metavar="N",
                        help="of them (default: %(default)s)")  # fmt: skip
    bench_options.add_request_options(parser)
    bench_options.add_target_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom bench throughput``."""
    bench_options.check_json(options)
    bench = _Bench(options)
    bench_options.conduct(bench)
    return 0 if bench.load is not None and bench.load.failed < len(bench.load.outcomes) else 1


class _Bench:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.load: Load | None = None
        self.single: list[Load] = []
        self.joins: Joins | None = None
        self.settings: dict[str, Any] = {}

    async def measure(self) -> None:
        """Starts, warms up, and sends them all; one at a time before and after, if asked for."""
        from rich.console import Console

        from steploom.cli.benches.load import Load

        options = self.options
        pixels = bench_options.sizes_of(options, (512,))
        dealt = workloads.deal(pixels, [1.0] * len(pixels), options.requests, options.seed)
        requests = [Arrival(0.0, size, size, options.steps or 20) for size in dealt]
        with Console(stderr=True).status("starting") as status:
            async with bench_options.measured(options) as (target, engine):
                if options.warm_up:
                    status.update("warming up")
                    await bench_options.warm_up(target, requests, options.warm_up)
                status.stop()
                if engine is not None:
                    self.settings = {name: getattr(engine.config, name) for name in ("model", "policy", "max_batch")}
                await self._one_at_a_time(target, requests, (options.baseline_requests + 1) // 2)
                self.joins = bench_options.watch(engine)
                with bench_options.progress("at once", len(requests)) as told:
                    limit = options.concurrency
                    self.load = Load(
                        target, requests, limit=limit, timeout_s=options.timeout, closed=True, on_change=told
                    )
                    await self.load.run()
                if engine is not None and self.joins is not None:
                    engine.observers.remove(self.joins)
                await self._one_at_a_time(target, requests, options.baseline_requests // 2)

    async def _one_at_a_time(self, target: Target, requests: list[Arrival], count: int) -> None:
        from steploom.cli.benches.load import Load

        if not self.options.baseline or not count:
            return
        some = [requests[index % len(requests)] for index in range(count)]
        with bench_options.progress("one at a time", count) as told:
            single = Load(
                target, some, limit=1, timeout_s=self.options.timeout, closed=True, on_change=told,
                first=1_000_000 * (1 + len(self.single)),
            )  # fmt: skip
            await single.run()
        self.single.append(single)

    def figures(self) -> dict[str, Any]:
        """All that is known so far, as ``--json`` writes it."""
        from steploom.cli.benches.figures import figures

        load = self.load
        assert load is not None
        found = figures(load.outcomes, load.duration_s)
        seconds = sum(one.duration_s for one in self.single)
        images = sum(out.answer.images for one in self.single for out in one.outcomes if out.answer is not None)
        alone = images / seconds if seconds and images else None
        watched = self.joins.figures() if self.joins is not None else {}
        return {
            **bench_options.about(self.options, self.settings),
            "num_prompts": len(load.arrivals),
            "max_concurrency": self.options.concurrency,
            "max_concurrent_requests": load.peak,
            **found,
            **{key: watched[key] for key in ("mean_rows", "ticks") if key in watched},
            "baseline_image_throughput": alone,
            "gain": found["image_throughput"] / alone if alone else None,
        }

    def tell(self, *, interrupted: bool = False) -> None:
        """Writes and prints the figures."""
        found = {**self.figures(), "interrupted": interrupted}
        if bench_options.write(self.options, found):
            from steploom.cli.benches.bench_table import show

            show(found, "Throughput Benchmark Result")
