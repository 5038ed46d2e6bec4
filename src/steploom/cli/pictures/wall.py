"""The wall: all requests of a round side by side in the terminal, each image as far as it has come."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
from PIL.Image import Image
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steploom.cli.demo import Job, Shown
from steploom.cli.generate import step_caption
from steploom.cli.pictures import tiles
from steploom.requests import StepEvent

if TYPE_CHECKING:
    from steploom import AsyncDiffusionEngine

TILE_WIDTHS = (32, 28, 24, 20, 16, 12)
"""Columns that a tile may take, widest first."""
SPACE = 2
FRAMES_PER_SECOND = 8


@dataclasses.dataclass
class Tile:
    """One request on the wall."""

    job: Job
    width: int
    picture: Text
    step: int = 0
    previews: list[tuple[str, Image]] = dataclasses.field(default_factory=list[tuple[str, Image]])
    image: Image | None = None

    def take(self, event: StepEvent) -> None:
        """Shows a step."""
        self.step = event.step
        if event.preview is not None:
            self.previews.append((step_caption(event), event.preview))
            self.picture = tiles.half_blocks(event.preview, self.width)

    def finish(self, image: Image) -> None:
        """Shows the finished image."""
        self.step, self.image = self.job.steps, image
        self.picture = tiles.half_blocks(image, self.width)

    def __rich__(self) -> RenderableType:
        """The picture, and below it how far it is."""
        label = f"{self.step}/{self.job.steps}"
        done = round((self.width - len(label) - 1) * self.step / self.job.steps)
        rest = self.width - len(label) - 1 - done
        bar = Text.assemble(
            (label, "bold" if self.image else ""), " ", ("━" * done, "green"), ("━" * rest, "bright_black")
        )
        return Group(self.picture, bar, Text())


def fitting(count: int, width: int, height: int) -> tuple[int, int]:
    """How wide tiles may be, and how many stand in a row, so that ``count`` of them fit into a terminal.

    The narrowest tiles are taken where even they do not fit; rows are as even as they can be.
    """
    tile, rows = TILE_WIDTHS[-1], count
    for tile in TILE_WIDTHS:
        rows = math.ceil(count / max(1, (width + SPACE) // (tile + SPACE)))
        if rows * (tile // 2 + 2) <= height - 3:
            break
    return tile, math.ceil(count / rows)


async def watch(console: Console, engine: AsyncDiffusionEngine, jobs: Sequence[Job]) -> list[Shown]:
    """Runs all jobs at once with a preview of every step; shows them where the console is a terminal."""
    width, columns = fitting(len(jobs), console.width, console.height)
    wall = [Tile(job, width, tiles.blank(width)) for job in jobs]
    live = Live(get_renderable=lambda: _grid(wall, columns), console=console, refresh_per_second=FRAMES_PER_SECOND)
    with live if console.is_terminal else contextlib.nullcontext():
        async with anyio.create_task_group() as tasks:
            for tile in wall:
                tasks.start_soon(_run, engine, tile, console)
    return [Shown(tile.job, tile.image, tile.previews) for tile in wall if tile.image is not None]


async def _run(engine: AsyncDiffusionEngine, tile: Tile, console: Console) -> None:
    job = tile.job
    async with engine.stream(job.prompt, seed=job.seed, preview_every=1, **job.parameters) as run:
        async for event in run:
            if isinstance(event, StepEvent):
                tile.take(event)
        tile.finish((await run.result()).images[0])
    if not console.is_terminal:
        console.print(f"  done: {job.prompt} ({job.steps} steps, guidance {job.guidance:g})", soft_wrap=True)


def _grid(wall: Sequence[Tile], columns: int) -> RenderableType:
    grid = Table.grid(padding=(0, SPACE, 0, 0))
    for start in range(0, len(wall), columns):
        grid.add_row(*wall[start : start + columns])
    return grid
