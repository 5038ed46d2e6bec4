"""``steploom generate``: images from a prompt, several at once in one batch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.errors import GenerationFailed, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

    from steploom import AsyncDiffusionEngine, DiffusionOutput

log = logging.getLogger(__name__)

_EXAMPLES = """
examples:
  the built-in model
    steploom generate "a large red circle above a small blue square on a white background" -o out.png
  four images that share every forward: out-1.png to out-4.png, with seeds 7, 8, 9 and 10
    steploom generate "a pink heart on a black background" -o out.png -n 4 --seed 7
  what it looked like after each step: out-steps.png
    steploom generate "a yellow star on a blue background" -o out.png --steps 28 --save-steps
  your own model, and an argument that only its pipeline knows
    steploom generate "a lighthouse at dusk" -o out.png --model ./my-sd3 --set max_sequence_length=128
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``generate`` to the command."""
    parser = arguments.add_command(commands, "generate", run, summary="make images from a prompt", examples=_EXAMPLES)
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path("out.png"), metavar="FILE",
                        help="where to put the image; its ending is the format (default: %(default)s)")  # fmt: skip
    parser.add_argument("-n", type=arguments.count, default=1, metavar="N", dest="number",
                        help="so many images with consecutive seeds, numbered FILE-1, FILE-2 ...")  # fmt: skip
    parser.add_argument(
        "--save-steps", action="store_true", help="also write FILE-steps.png: the image after each step"
    )
    group = parser.add_argument_group("generation")
    group.add_argument("--steps", type=arguments.count, metavar="N", help="denoising steps (default: the pipeline's)")
    group.add_argument("--guidance", type=float, metavar="G", help="guidance scale; 1 turns guidance off")
    group.add_argument("--seed", type=int, metavar="S", help="same seed, same image (default: drawn, and printed)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    group.add_argument("--width", type=arguments.count, metavar="PX", help="in pixels (default: the model's)")
    group.add_argument("--height", type=arguments.count, metavar="PX", help="in pixels (default: the model's)")
    group.add_argument("--set", type=arguments.setting, action="append", default=[], metavar="KEY=VALUE", dest="extra",
                       help="any further argument of the pipeline; may be repeated")  # fmt: skip
    arguments.add_engine_options(parser)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom generate``."""
    arguments.check_image_file(options.output)
    jobs = _jobs(options)
    from steploom.cli import loop

    loop.run(_generate(options, jobs))
    return 0


@dataclasses.dataclass
class Job:
    """One image asked for, and what became of it."""

    file: pathlib.Path
    seed: int
    previews: list[tuple[str, Image]] = dataclasses.field(default_factory=list[tuple[str, "Image"]])
    output: DiffusionOutput | None = None
    error: RequestError | None = None


def _jobs(options: argparse.Namespace) -> list[Job]:
    """One job per image: seeds count up, files are numbered if there are several."""
    first = secrets.randbits(31) if options.seed is None else options.seed
    file: pathlib.Path = options.output
    if options.number == 1:
        return [Job(file, first)]
    return [Job(file.with_stem(f"{file.stem}-{place + 1}"), first + place) for place in range(options.number)]


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments, under diffusers' names; what was not given is left to the pipeline."""
    named = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "width": options.width,
        "height": options.height,
    }
    return {**{name: value for name, value in named.items() if value is not None}, **dict(options.extra)}


async def _generate(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Starts an engine, runs all jobs in it at once, and saves what came of them.

    Raises:
        RequestError: A job failed; the others' images are saved all the same.
        EngineError: The engine failed.
    """
    import anyio
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from steploom import AsyncDiffusionEngine

    config = arguments.engine_config(options)
    parameters = {**_parameters(options), "preview_every": int(options.save_steps)}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        loading = progress.add_task(f"loading {config.model}", total=None)
        engine = AsyncDiffusionEngine(config)
        await engine.start(lambda line: progress.update(loading, description=line))
        log.info("%s is loaded; %d requests start", config.model, len(jobs))
        try:
            progress.remove_task(loading)
            async with anyio.create_task_group() as tasks:
                for job in jobs:
                    tasks.start_soon(_run, engine, job, options.prompt, parameters, progress)
        finally:
            await engine.close()
    for job in jobs:
        await anyio.to_thread.run_sync(functools.partial(_save, job, options.prompt))
    failed = next((job.error for job in jobs if job.error is not None), None)
    if failed is not None:
        raise failed


async def _run(
    engine: AsyncDiffusionEngine, job: Job, prompt: str, parameters: Mapping[str, Any], progress: Progress
) -> None:
    """Runs one job to its end; a request's error is kept in the job, so that the others go on."""
    from steploom import StepEvent

    bar = progress.add_task(f"{job.file.name}  seed {job.seed}", total=None)
    try:
        async with engine.stream(prompt, seed=job.seed, **parameters) as events:
            async for event in events:
                if not isinstance(event, StepEvent):
                    continue
                progress.update(bar, completed=event.step, total=event.total_steps)
                if event.preview is not None:
                    job.previews.append((step_caption(event), event.preview))
            job.output = await events.result()
    except RequestError as error:
        job.error = error


def step_caption(event: Any) -> str:
    """What a contact sheet writes below the image after a step."""
    return f"step {event.step}" + ("" if event.sigma is None else f"\nnoise {event.sigma:.2f}")


def _save(job: Job, prompt: str) -> None:
    """Writes a finished job's image, and its contact sheet if there are previews, and says where."""
    if job.output is None:
        return
    image = _write(job.output, job.file)
    timings = job.output.timings
    shared = f", {timings.mean_batch_requests:.1f} requests a forward" if timings.mean_batch_requests > 1 else ""
    size = f"{image.width}x{image.height}"
    _say(f"{job.file}  {size}, seed {job.seed}, {timings.steps} steps in {timings.total_s:.2f} s{shared}")
    if job.previews:
        from steploom.cli.sheet import contact_sheet

        captions, previews = zip(*job.previews, strict=True)
        file = job.file.with_name(f"{job.file.stem}-steps.png")
        subtitle = f"seed {job.seed}: the estimate of the finished image after each step, and the result"
        contact_sheet([*previews, image], [*captions, "result"], title=prompt, subtitle=subtitle).save(file)
        _say(f"{file}  {len(previews)} steps")


def _write(output: DiffusionOutput, file: pathlib.Path) -> Image:
    """Saves the output's image, or its frames as an animation, and returns the image, or the last frame.

    Raises:
        GenerationFailed: The pipeline returned neither, or frames that the file's format cannot hold.
    """
    frames: list[list[Image]] | None = getattr(output.output, "frames", None)
    if frames is None:
        image: Image = output.images[0]
        image.save(file)
        return image
    first, *rest = frames[0]
    if file.suffix.lower() not in (".gif", ".webp"):
        raise GenerationFailed(f"-o {file}: the pipeline made {len(rest) + 1} frames; use .gif or .webp")
    first.save(file, save_all=True, append_images=rest, duration=60, loop=0)
    return rest[-1] if rest else first


def _say(text: str) -> None:
    import sys

    sys.stdout.write(text + "\n")
