"""``steploom generate``: images, videos, sound or text from a prompt, several at once in one batch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steploom import lora, media
from steploom.cli import arguments, outputs
from steploom.config import expanded
from steploom.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

    from steploom import AsyncDiffusionEngine, DiffusionOutput, EngineConfig
    from steploom.cli.pictures.growing import GrowingText

log = logging.getLogger(__name__)

_EXAMPLES = """
examples:
  the built-in model
    steploom generate "a large red circle above a small blue square on a white background" -o out.png
  four images in shared forwards: out-1.png to out-4.png, with seeds 7, 8, 9 and 10
    steploom generate "a pink heart on a black background" -o out.png -n 4 --seed 7
  what it looked like after each step: out-steps.png
    steploom generate "a yellow star on a blue background" -o out.png --steps 28 --save-steps
  another task of the same model: from an image (--mask-image too: inpainting)
    steploom generate "a cat" -o out.png --model ./my-sd3 --task image-to-image --image in.png --strength 0.6
  a language model answers; on a terminal its text grows as it is committed
    steploom generate "Why is the sky blue?" --model ./my-llada2 --set gen_length=128
  a video of your own model; the file's ending is the format
    steploom generate "waves at dusk" -o waves.mp4 --model owner/wan --set num_frames=33 --fps 16
  your own model, and an argument that only its pipeline knows
    steploom generate "a lighthouse at dusk" -o out.png --model ./my-sd3 --set max_sequence_length=128
  with LoRA adapters, the second at half strength
    steploom generate "a lighthouse at dusk" -o out.png --model ./my-sd3 --lora ./ink.safetensors --lora ./fog=0.5
"""

_FLAGS = {
    "prompt": "PROMPT",
    "seed": "--seed",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative-prompt",
    "width": "--width",
    "height": "--height",
    "image": "--image",
    "mask_image": "--mask-image",
    "control_image": "--control-image",
    "strength": "--strength",
    "cache": "--cache",
}
"""Arguments of the pipeline that have an option of their own."""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``generate`` to the command."""
    parser = arguments.add_command(
        commands, "generate", run, summary="make images, videos, sound or text from a prompt", examples=_EXAMPLES
    )
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="FILE",
                        help="where to put it; its ending is the format: .png .jpg .gif .webp, .mp4 .webm, .wav .flac "
                        ".mp3, .txt (default: out, with an ending that fits; text is printed)")  # fmt: skip
    parser.add_argument("-n", type=arguments.count, default=1, metavar="N", dest="number",
                        help="so many with consecutive seeds, numbered FILE-1, FILE-2 ...")  # fmt: skip
    parser.add_argument("--fps", type=arguments.rate, metavar="R",
                        help="frames per second of a video file (default: the pipeline's, else 16)")  # fmt: skip
    parser.add_argument(
        "--save-steps", action="store_true", help="also write FILE-steps.png: the image after each step"
    )
    group = parser.add_argument_group("generation")
    group.add_argument("--steps", type=arguments.count, metavar="N", help="denoising steps (default: the pipeline's)")
    group.add_argument("--guidance", type=arguments.finite, metavar="G", help="guidance scale; 1 turns guidance off")
    group.add_argument("--seed", type=int, metavar="S", help="same seed, same image (default: drawn, and printed)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    group.add_argument("--width", type=arguments.count, metavar="PX", help="in pixels (default: the model's)")
    group.add_argument("--height", type=arguments.count, metavar="PX", help="in pixels (default: the model's)")
    _add_picture_options(group)
    group.add_argument("--lora", type=arguments.adapter, action="append", default=[], metavar="PATH[=SCALE]",
                       help="a LoRA adapter: a file, a folder or a hub id; may be repeated")  # fmt: skip
    group.add_argument("--cache", type=arguments.step_cache, metavar="NAME[:T]", help="skip steps that would hardly "
                       "change the denoiser's output: easycache, easycache:0.1 or off")  # fmt: skip
    group.add_argument("--set", type=arguments.settings_beside(**_FLAGS), action="append", default=[],
                       metavar="KEY=VALUE", dest="extra",
                       help="any further argument of the pipeline; may be repeated")  # fmt: skip
    arguments.add_engine_options(parser)


def _add_picture_options(group: arguments.Options) -> None:
    """Adds the options of tasks that start from an image."""
    group.add_argument(
        "--task", metavar="TASK", help="image-to-image, inpainting, controlnet (default: the model's own)"
    )
    for name, what in (
        ("image", "to start from"),
        ("mask-image", "white where to paint"),
        ("control-image", "to follow"),
    ):
        group.add_argument(f"--{name}", type=pathlib.Path, metavar="FILE", help=f"an image {what}")
    group.add_argument("--strength", type=arguments.finite, metavar="S", help="0 keeps the image, 1 ignores it")


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom generate``. What can be known to be wrong is refused before anything is loaded.

    Raises:
        ConfigError: A setting is wrong, or a file cannot be written.
        RequestError: A request is wrong, or failed.
    """
    from steploom import DiffusionRequest

    outputs.check_file(options.output or outputs.DEFAULT)
    config = arguments.engine_config(options)
    config = dataclasses.replace(config, max_waiting=max(config.max_waiting, options.number))
    for name, _ in options.lora:
        lora.find(name, config.loras or {})
    parameters = _parameters(options)
    jobs = _jobs(options)
    for job in jobs:
        DiffusionRequest(options.prompt, seed=job.seed, **parameters)
        for file in _files(job, parameters, steps=options.save_steps):
            outputs.check_writable(file)
    _check_limits(config, parameters)
    _check_pictures(parameters)
    from steploom.cli import loop, quiet

    with quiet.bars(config):
        loop.run(_generate(options, config, jobs, {**parameters, "preview_every": int(options.save_steps)}))
    return 0


@dataclasses.dataclass
class Job:
    """One request, and what became of it; ``printed`` if that goes to standard output, where ``text`` writes it."""

    file: pathlib.Path
    seed: int
    printed: bool = False
    text: GrowingText | None = None
    previews: list[tuple[str, Image]] = dataclasses.field(default_factory=list[tuple[str, "Image"]])
    output: DiffusionOutput | None = None
    error: RequestError | OSError | None = None

    @property
    def sheet(self) -> pathlib.Path:
        """Where its contact sheet goes."""
        return self.file.with_name(f"{self.file.stem}-steps.png")


def _jobs(options: argparse.Namespace) -> list[Job]:
    """One job per image: seeds count up, files are numbered if there are several."""
    first = secrets.randbits(31) if options.seed is None else options.seed
    files = media.numbered(options.output or outputs.DEFAULT, options.number)
    return [Job(file, first + place) for place, file in enumerate(files)]


def _files(job: Job, parameters: Mapping[str, Any], *, steps: bool) -> list[pathlib.Path]:
    """The files that a job will write."""
    return [*outputs.expected(job.file, parameters), *([job.sheet] if steps else [])]


def _check_limits(config: EngineConfig, parameters: Mapping[str, Any]) -> None:
    """Refuses at once what the engine would refuse when it has loaded the model.

    Raises:
        ConfigError: More steps or pixels than the settings allow.
    """
    steps, width, height = (parameters.get(name, 1) for name in ("num_inference_steps", "width", "height"))
    if steps > config.max_steps:
        raise ConfigError(f"--steps {steps}: at most {config.max_steps}; set STEPLOOM_MAX_STEPS to allow more")
    if width * height > config.max_pixels:
        raise ConfigError(
            f"--width {width} --height {height}: at most {config.max_pixels} pixels; set STEPLOOM_MAX_PIXELS to allow "
            "more"
        )


def _check_pictures(parameters: Mapping[str, Any]) -> None:
    """Refuses at once an image that is not there.

    Raises:
        ConfigError: There is no such file.
    """
    for name, value in parameters.items():
        if isinstance(value, pathlib.Path) and not expanded(value, _FLAGS[name]).is_file():
            raise ConfigError(f"{_FLAGS[name]} {value}: there is no such file")


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments, under diffusers' names; what was not given is left to the pipeline."""
    named = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "width": options.width,
        "height": options.height,
        "task": options.task,
        "image": options.image,
        "mask_image": options.mask_image,
        "control_image": options.control_image,
        "strength": options.strength,
        "cache": options.cache,
    }
    if options.lora:
        named["lora"] = options.lora
    return {**{name: value for name, value in named.items() if value is not None}, **dict(options.extra)}


async def _generate(
    options: argparse.Namespace, config: EngineConfig, jobs: Sequence[Job], parameters: Mapping[str, Any]
) -> None:
    """Starts an engine, runs all jobs in it at once, and saves what came of them.

    Raises:
        RequestError: A job failed; the others' images are saved all the same.
        OSError: A file cannot be written; likewise.
        EngineError: The engine failed.
    """
    import anyio
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from steploom import AsyncDiffusionEngine
    from steploom.cli.pictures.growing import GrowingText

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
            _choose_files(options, jobs, engine, parameters)
            async with anyio.create_task_group() as tasks:
                for job in jobs:
                    job.text = GrowingText(progress, live=job.printed and len(jobs) == 1)
                    tasks.start_soon(_run, engine, job, options.prompt, parameters, progress)
        finally:
            await engine.close()
    for job in jobs:
        try:
            await anyio.to_thread.run_sync(functools.partial(_save, job, options))
        except (RequestError, OSError) as error:  # of a full disk: others may be smaller
            job.error = error
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
                if job.text is not None:
                    job.text.hear(event)
                if not isinstance(event, StepEvent):
                    continue
                progress.update(bar, completed=event.step, total=event.total_steps)
                if event.preview is not None:
                    job.previews.append((step_caption(event), event.preview))
            job.output = await events.result()
    except RequestError as error:
        job.error = error
        if job.text is not None:
            job.text.break_off()


def step_caption(event: Any) -> str:
    """What a contact sheet writes below the image after a step."""
    return f"step {event.step}" + ("" if event.sigma is None else f"\nnoise {event.sigma:.2f}")


def _choose_files(
    options: argparse.Namespace, jobs: Sequence[Job], engine: AsyncDiffusionEngine, parameters: Mapping[str, Any]
) -> None:
    """Holds the files against what the loaded pipeline makes; where nobody named any, their ending follows from it.

    Raises:
        ConfigError: A file cannot hold that, or cannot be written.
    """
    makes = getattr(getattr(engine, "info", None), "makes", [])
    for job in jobs:
        if options.output is not None:
            outputs.check_kind(job.file, makes, parameters)
            continue
        file = outputs.default_file(job.file, makes)
        job.printed = file is None
        if file is not None and file != job.file:
            job.file = outputs.check_file(file)
            outputs.check_writable(job.file)


def _save(job: Job, options: argparse.Namespace) -> None:
    """Writes what a finished job made, and its contact sheet if there are previews, and says where."""
    if job.output is None:
        return
    if job.printed and job.text is not None and job.output.has("text"):
        texts = job.output.text
        job.text.finish("\n".join(map(str, texts)) if isinstance(texts, list) else str(texts))  # pyright: ignore
        return
    written = outputs.write(job.output, job.file, options.fps)
    timings = job.output.timings
    shared = f", {timings.mean_batch_requests:.1f} requests a forward" if timings.mean_batch_requests > 1 else ""
    skipped = f" ({timings.skipped_steps} skipped)" if timings.skipped_steps else ""
    took = f"{timings.steps} steps{skipped} in {timings.total_s:.2f} s{shared}"
    for place, saved in enumerate(written, start=1):
        which = f", image {place} of {len(written)}" if len(written) > 1 else ""
        _say(f"{saved.file}  {saved.what}, seed {job.seed}{which}, {took}")
    result = written[0].picture
    if job.previews and result is not None:
        from steploom.cli.pictures.sheet import contact_sheet

        captions, previews = zip(*job.previews, strict=True)
        subtitle = f"seed {job.seed}: the estimate of the finished image after each step, and the result"
        pictures, captions = [*previews, result], [*captions, "result"]
        media.write(contact_sheet(pictures, captions, title=options.prompt, subtitle=subtitle), job.sheet)
        _say(f"{job.sheet}  {len(previews)} steps")


def _say(text: str) -> None:
    import sys

    sys.stdout.write(text + "\n")
