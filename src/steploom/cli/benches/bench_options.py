"""What ``steploom bench serve`` and ``steploom bench throughput`` have in common: their options, what they send to."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steploom.cli import arguments
from steploom.cli.benches import workloads
from steploom.cli.benches.workloads import Arrival
from steploom.errors import ConfigError

if TYPE_CHECKING:
    from steploom.cli.benches.joins import Joins
    from steploom.cli.benches.load import Load, Target
    from steploom.config import EngineConfig

_FLAGS = {"num_inference_steps": "--steps", "width": "--size", "height": "--size", "prompt": "--prompt"}
WARM_UP_STEPS = 4
"""Steps of a request that warms up, at most: enough for merges to be learned and verified."""


class Bench(Protocol):
    """A benchmark that can be interrupted."""

    load: Load | None

    def measure(self) -> Coroutine[Any, Any, None]:
        """Runs it."""
        ...

    def tell(self, *, interrupted: bool = False) -> None:
        """Says what it found."""
        ...


def conduct(bench: Bench) -> None:
    """Runs ``bench``, and says what it found; after Ctrl-C what there is so far."""
    from steploom.cli import loop

    try:
        loop.run(bench.measure())
    except KeyboardInterrupt:
        if bench.load is not None and bench.load.outcomes:
            bench.tell(interrupted=True)
        raise
    bench.tell()


def sizes(text: str) -> tuple[int, ...]:
    """``512`` or ``512,768,1024``: pixels."""
    try:
        return tuple(arguments.count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be pixels, for example 512 or 512,1024") from None


def no_or_count(text: str) -> int:
    """An integer of at least 0."""
    return 0 if text.strip() == "0" else arguments.count(text)


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`measured` reads."""
    server = parser.add_argument_group("a server")
    server.add_argument("--url", metavar="URL",
                        help="send to the images API there, for example http://127.0.0.1:8000; "
                        "without it, to an engine that is started here")  # fmt: skip
    server.add_argument("--api-key", metavar="KEY", help="of the server")
    server.add_argument("--api-model", metavar="NAME", help="what the server calls its model")
    server.add_argument("--plain", action="store_true",
                        help="send OpenAI's own fields alone: neither steps nor seeds")  # fmt: skip
    arguments.add_engine_options(parser)
    engine = parser.add_argument_group("the engine's batch")
    engine.add_argument("--policy", metavar="NAME", help="EngineConfig.policy: a short name, or pkg.module.Class")
    engine.add_argument("--max-batch", metavar="N", help="EngineConfig.max_batch: requests that share a tick, at most")


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all requests have in common, and how figures are told."""
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of arrivals, sizes, prompts and images (default: 0)")  # fmt: skip
    parser.add_argument("--size", type=sizes, metavar="PX[,PX]",
                        help="width and height; several are dealt out (default: the workload's; the built-in model's "
                        "are 32,48,64,96)")  # fmt: skip
    parser.add_argument("--steps", type=arguments.count, metavar="N", help="of each (default: the workload's, or 20)")
    parser.add_argument("--prompt", metavar="TEXT", help="of all (default: a different one for each)")
    parser.add_argument("--set", type=arguments.settings_beside(**_FLAGS), action="append", default=[],
                        metavar="KEY=VALUE", dest="extra",
                        help="any further argument of the pipeline; may be repeated")  # fmt: skip
    parser.add_argument("--warm-up", type=no_or_count, default=4, metavar="N",
                        help=f"requests of each size that are sent first, together, of {WARM_UP_STEPS} steps at most; "
                        "not counted (default: %(default)s)")  # fmt: skip
    parser.add_argument("--timeout", type=arguments.rate, metavar="S", help="give a request up after so many seconds")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - prints them instead of the table")


def sizes_of(options: argparse.Namespace, default: tuple[int, ...] = workloads.SIZES) -> tuple[int, ...]:
    """The sizes that are asked for: given, else the workload's, or what the built-in model takes in their place."""
    if options.size is not None:
        return options.size
    if options.url is None and options.model in (None, "demo"):
        return tuple(workloads.SMALL_SIZES[workloads.SIZES.index(size)] for size in default)
    return default


def config_of(options: argparse.Namespace) -> EngineConfig:
    """The engine's settings.

    Raises:
        ConfigError: One is wrong.
    """
    given: dict[str, Any] = {} if options.policy is None else {"policy": options.policy}
    if options.max_batch is not None:
        text: str = options.max_batch
        given["max_batch"] = int(text) if text.lstrip("-").isdecimal() else text  # EngineConfig says what else it takes
    return arguments.engine_config(options, **given)


@contextlib.asynccontextmanager
async def measured(options: argparse.Namespace) -> AsyncGenerator[tuple[Target, Any]]:
    """What the load is sent to, warm; and the engine, if it is one of this process.

    Raises:
        SteploomError: A setting is wrong, the engine does not start, or a request of the warm-up fails.
    """
    from steploom.cli.benches.targets import Asking, EngineTarget, ServerTarget

    previews = bool(getattr(options, "previews", False))
    asking = Asking(options.seed, options.prompt, dict(options.extra), previews)
    if options.url is not None:
        yield (
            ServerTarget(options.url, asking, api_key=options.api_key, model=options.api_model, plain=options.plain),
            None,
        )
        return
    from steploom.engine.async_engine import AsyncDiffusionEngine

    async with AsyncDiffusionEngine(config_of(options)) as engine:
        yield EngineTarget(engine, asking), engine


async def warm_up(target: Target, workload: list[Arrival], each: int) -> None:
    """Sends so many short requests of each size, all together.

    Their numbers of steps differ, so that their timesteps do: a merge counts as verified once all that may differ did.

    Raises:
        Exception: What the target raises.
    """
    import anyio

    shapes = sorted({(one.width, one.height) for one in workload})
    async with anyio.create_task_group() as group:
        for index, (width, height) in enumerate(shape for shape in shapes for _ in range(each)):
            short = Arrival(0.0, width, height, WARM_UP_STEPS - index % 3)
            group.start_soon(target.send, 2_000_000 + index, short)


def watch(engine: Any) -> Joins | None:
    """An observer of the engine, from now on; None of a server."""
    if engine is None:
        return None
    from steploom.cli.benches.joins import Joins

    most = engine.config.max_batch
    joins = Joins(most if isinstance(most, int) else None)
    engine.observers.append(joins)
    return joins


@contextlib.contextmanager
def progress(title: str, total: int) -> Generator[Callable[[Load], None]]:
    """A line on standard error that says how far a load is; yields what its ``on_change`` takes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("{task.fields[now]}"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, now="")

        def told(load: Load) -> None:
            failed = f", {load.failed} failed" if load.failed else ""
            bar.update(task, completed=len(load.outcomes), now=f"{load.in_flight} in flight{failed}")

        yield told


def about(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures are of: when, what was measured, and with which settings."""
    import datetime

    from steploom import __version__

    policy = settings.get("policy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": "steploom" if options.url is None else "openai",
        "steploom": __version__,
        "url": options.url,
        "model_id": options.api_model if options.url is not None else settings.get("model"),
        "policy": policy if policy is None or isinstance(policy, str) else policy.__name__,
        "max_batch": settings.get("max_batch"),
        "seed": options.seed,
    }


def check_json(options: argparse.Namespace) -> None:
    """Refuses a ``--json`` that cannot be written, before any work.

    Raises:
        ConfigError: There is no such folder, or it is one itself.
    """
    if options.json in (None, "-"):
        return
    place = Path(options.json)
    if place.is_dir() or not place.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: is a folder, or lies in none; give a file, or - to print it")


def write(options: argparse.Namespace, found: dict[str, Any]) -> bool:
    """Writes the figures where ``--json`` says; returns whether the table is to be printed too."""
    from steploom.cli.benches.figures import plain

    if options.json is None:
        return True
    text = json.dumps(plain(found), indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return False
    Path(options.json).write_text(text)
    return True
