"""``steploom bench``: where the time goes on this machine, and how the engine or a server does under load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.cli.benches import bench_serve, bench_throughput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from steploom.engine.async_engine import AsyncDiffusionEngine

_BENCH_EXAMPLES = """
examples:
  steploom bench tick                                  where the time of a tick goes
  steploom bench throughput --baseline                 images a second, beside one at a time
  steploom bench serve --workload W1 --load 0.9        latency under load, with four sizes of images
  steploom bench serve --url http://127.0.0.1:8000 --rate 5 --size 64   of a server that runs

`steploom bench serve --help` and so on say more; docs/benchmarking.md tells what each figure means.
"""
_EXAMPLES = """
examples:
  where a tick's time goes, on the built-in model
    steploom bench tick
  on a model of your own, 16 requests at a time, and a trace for chrome://tracing or ui.perfetto.dev
    steploom bench tick --model ./my-flux --requests 16 --size 512 --trace tick.json
  further arguments of the pipeline
    steploom bench tick --model ./my-sd3 --set guidance_scale=7 --json

Requests are generated once to warm up, then again and measured: `forward` is the models', everything else is ours or
the pipeline's own Python. A steady tick is one in which nobody joins or leaves.
"""
_FLAGS = {"num_inference_steps": "--steps", "width": "--size", "height": "--size", "prompt": "--prompt"}
EXTENSION = "steploom.worker.tick_profile.TickProfile"


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``bench`` to the command."""
    summary = "where the time of a tick goes; latency and throughput under load"
    parser = commands.add_parser("bench", help=summary, description=f"{summary.capitalize()}.", epilog=_BENCH_EXAMPLES)
    whats = parser.add_subparsers(title="what", metavar="WHAT", required=True, dest="what")
    _add_tick(whats)
    for command in (bench_throughput, bench_serve):
        command.add_parser(whats)


def _add_tick(commands: arguments.Commands) -> None:
    summary = "where the time of a tick goes on this machine"
    parser = arguments.add_command(commands, "tick", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument("--model", type=arguments.model, default="demo", metavar="MODEL",
                        help="a folder, a hub id, a file, pkg.module:factory, or demo (the default)")  # fmt: skip
    parser.add_argument("--requests", type=arguments.count, default=8, metavar="N",
                        help="at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=arguments.count, default=20, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--size", type=arguments.count, metavar="PX", help="width and height (default: the pipeline's)")
    parser.add_argument("--prompt", default="a large red circle on a white background", metavar="TEXT")
    parser.add_argument("--set", type=arguments.settings_beside(**_FLAGS), action="append", default=[],
                        metavar="KEY=VALUE", dest="extra",
                        help="any further argument of the pipeline; may be repeated")  # fmt: skip
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the worker's parts")
    parser.add_argument("--json", action="store_true", help="print figures as JSON instead of a table")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    arguments.add_loading_options(parser)
    parser.set_defaults(backend=None)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom bench tick``."""
    from rich.console import Console

    from steploom.cli import loop

    figures, slices = loop.run(_measure(options))
    if options.trace is not None:
        options.trace.write_text(json.dumps(trace(slices)))
    console = Console(highlight=False)
    if options.json:
        console.print_json(json.dumps(figures))
    else:
        _show(console, figures)
    return 0


async def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    from rich.console import Console

    from steploom.cli.benches.ticks import Ticks
    from steploom.engine.async_engine import AsyncDiffusionEngine

    many = options.requests
    config = arguments.engine_config(options, worker_extension=EXTENSION, max_batch=many, max_resident=max(many, 32))
    with Console(stderr=True).status("loading") as status:
        async with AsyncDiffusionEngine(config) as engine:
            status.update("warming up")
            await _generate(engine, options)
            ticks = Ticks()
            engine.observers.append(ticks)
            status.update("measuring")
            await engine.collective_rpc("start_profile")
            await _generate(engine, options)
            found: Any = await engine.collective_rpc("stop_profile", unique_reply_rank=0)
    return summary(found, ticks.spans), found["slices"]


async def _generate(engine: AsyncDiffusionEngine, options: argparse.Namespace) -> None:
    import anyio

    size = {} if options.size is None else {"width": options.size, "height": options.size}
    async with anyio.create_task_group() as group:
        for seed in range(options.requests):
            call = engine.generate
            settings = {"seed": seed, "num_inference_steps": options.steps, **size, **dict(options.extra)}
            group.start_soon(lambda given=settings, call=call: call(options.prompt, **given))


def summary(found: dict[str, Any], spans: Sequence[tuple[float, float, float, bool]]) -> dict[str, Any]:
    """The figures: milliseconds a tick by part, and what a steady tick spends outside its forward.

    Args:
        found: What the worker measured.
        spans: Of each tick: seconds as the engine saw it, the worker's, its forwards', and whether it was steady.
    """
    import statistics

    ticks = max(found["ticks"], 1)
    parts = {name: 1000 * seconds / ticks for name, seconds in found["seconds"].items()}
    steady = [span for span in spans if span[3]] or list(spans)
    parts["engine"] = 1000 * max(sum(span[0] - span[1] for span in spans) / ticks, 0) if spans else 0.0
    # what the engine does while the worker waits is the worker's idle time: it is told once
    parts["idle"] = max(parts["idle"] - parts["engine"], 0.0)
    return {
        "ticks": found["ticks"],
        "requests_per_tick": found["rows"] / ticks,
        "ms_per_tick": parts,
        "steady_tick_ms": 1000 * statistics.median(span[1] for span in steady) if steady else 0.0,
        "steady_forward_ms": 1000 * statistics.median(span[2] for span in steady) if steady else 0.0,
        "steady_outside_ms": 1000 * statistics.median(span[1] - span[2] for span in steady) if steady else 0.0,
    }


def trace(slices: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """The slices as a Chrome trace."""
    first = slices[0][1] if slices else 0.0
    events = [
        {"name": part, "ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * (began - first), "dur": 1e6 * length, "cat": "tick"}
        for part, began, length in slices
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _show(console: Console, figures: dict[str, Any]) -> None:
    from rich.table import Table

    parts: dict[str, float] = figures["ms_per_tick"]
    whole = sum(parts.values()) or 1.0
    table = Table("part", "ms a tick", "us a request", "share", box=None, title="where a tick's time goes")
    for column in table.columns[1:]:
        column.justify = "right"
    each = max(figures["requests_per_tick"], 1)
    for name, ms in sorted(parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{ms:.3f}", f"{1000 * ms / each:.0f}", f"{ms / whole:.1%}")
    console.print(table)
    console.print(f"{figures['ticks']} ticks of {each:.1f} requests")
    steady, outside = figures["steady_tick_ms"], figures["steady_outside_ms"]
    console.print(f"a steady tick: {steady:.2f} ms, {outside:.2f} ms of it outside its forward")
