"""``steploom demo``: twelve prompts at once on the built-in model, watched, kept, and timed beside one-at-a-time."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pathlib
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steploom import media
from steploom.cli import arguments

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from steploom.cli.comparison import Comparison

_EXAMPLES = """
examples:
  steploom demo                  watch, then compare; leaves out/*.png
  steploom demo --rounds 0       only watch
  steploom demo -o /tmp/demo     leave the images elsewhere
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of the demonstration."""

    prompt: str
    steps: int
    guidance: float
    seed: int

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments for ``generate`` and, without the seed, for ``pipe(...)`` alike."""
        # The pipeline pads every prompt with that many empty tokens of a text encoder that the model does not have.
        size = {"width": 64, "height": 64, "max_sequence_length": 16}
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, **size}


JOBS = (
    Job("a large red circle above a small blue square on a white background", 36, 4.0, 1),
    Job("a large yellow star on a black background", 24, 3.0, 2),
    Job("a medium green triangle to the left of a medium orange diamond on a gray background", 28, 5.0, 3),
    Job("a large pink heart on a white background", 16, 4.0, 4),
    Job("a small cyan ring above a large purple square on a yellow background", 32, 4.5, 5),
    Job("a medium orange circle to the right of a small green star on a white background", 20, 3.5, 6),
    Job("a large blue diamond on a pink background", 18, 1.0, 7),
    Job("a small yellow heart below a large blue circle on a white background", 30, 4.0, 8),
    Job("a large purple ring on a white background", 14, 2.5, 15),
    Job("a medium red star above a medium cyan triangle on a black background", 26, 5.5, 10),
    Job("a large green square to the left of a small pink heart on a blue background", 22, 4.0, 11),
    Job("a medium red triangle on a yellow background", 12, 3.0, 12),
)
"""Different prompts, step counts and guidance scales; one has no guidance. Every step of the first is kept."""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``demo`` to the command."""
    summary = "watch twelve images develop at once on the built-in model, beside one at a time"
    parser = arguments.add_command(commands, "demo", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path("out"), metavar="FOLDER",
                        help="where to put the images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=_rounds, default=3, metavar="N",
                        help="timed rounds of each way; 0 skips the comparison (default: %(default)s)")  # fmt: skip


def _rounds(text: str) -> int:
    return 0 if text == "0" else arguments.count(text)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom demo``."""
    from rich.console import Console

    from steploom.cli import loop

    options.output.mkdir(parents=True, exist_ok=True)
    loop.run(_demo(Console(highlight=False), options.output, options.rounds))
    return 0


async def _demo(console: Console, folder: pathlib.Path, rounds: int) -> None:
    """Loads the model, shows one round, times the others, leaves the files and says what came of it."""
    import anyio

    from steploom import AsyncDiffusionEngine
    from steploom.cli import comparison
    from steploom.cli.pictures import wall

    with console.status("loading the built-in model"):
        pipe = await anyio.to_thread.run_sync(load)
    console.print(f"{len(JOBS)} prompts, {sum(job.steps for job in JOBS)} steps in all, one engine:")
    measured: Comparison | None = None
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=len(JOBS)) as engine:
        shown = await wall.watch(console, engine, JOBS)
        if rounds:
            measured = await comparison.compare(console, engine, pipe, JOBS, rounds)
    files = await anyio.to_thread.run_sync(save, folder, shown)
    if measured is not None:
        console.print(comparison.report(measured), soft_wrap=True)
    console.print(f"\n{len(shown)} images and two contact sheets: {files}", soft_wrap=True)


def load() -> Any:
    """The built-in model as diffusers loads it, in float32, on the GPU if there is one."""
    for library in ("diffusers", "transformers"):
        chatter: Any = importlib.import_module(f"{library}.utils.logging")
        chatter.disable_progress_bar()
        chatter.set_verbosity_error()
    from steploom.config import EngineConfig
    from steploom.worker.models import loading

    pipe = loading.load(EngineConfig(model="demo", dtype="float32"), lambda _: None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclasses.dataclass
class Shown:
    """What the watched round left of one job: its image and what it looked like after each step."""

    job: Job
    image: Image
    previews: list[tuple[str, Image]]


def save(folder: pathlib.Path, shown: Sequence[Shown]) -> str:
    """Writes the images, one sheet of them all, and one of the steps of the first; returns where they are."""
    from steploom.cli.pictures.sheet import contact_sheet

    for place, one in enumerate(shown, start=1):
        words = one.job.prompt.partition(" on a ")[0].split()
        media.write(one.image, folder / f"{place:02d}-{'-'.join(word for word in words if word != 'a')}.png")
    captions = [_caption(one.job) for one in shown]
    together = f"{len(shown)} requests in one engine, each with its own prompt, steps, guidance and seed"
    all_of_them = contact_sheet([one.image for one in shown], captions, title="steploom", subtitle=together, tile=184)
    media.write(all_of_them, folder / "all.png")
    first = shown[0]
    captions, previews = zip(*first.previews, strict=True)
    developing = f"{first.job.steps} steps, the estimate of the finished image after each; seed {first.job.seed}"
    sheet = contact_sheet(previews, captions, title=first.job.prompt, subtitle=developing, columns=9, tile=112)
    media.write(sheet, folder / "steps.png")
    return f"{folder}/*.png, {folder / 'all.png'}, {folder / 'steps.png'}"


def _caption(job: Job) -> str:
    """A job's prompt in lines that fit below its image, and its settings."""
    return "\n".join([*textwrap.wrap(job.prompt, 26), f"{job.steps} steps, guidance {job.guidance:g}"])
