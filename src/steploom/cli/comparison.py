"""The comparison: the same jobs together in the engine and one at a time through ``pipe(...)``, alternately."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from PIL.Image import Image
from rich.console import Console

from steploom.cli.demo import Job

if TYPE_CHECKING:
    from steploom import AsyncDiffusionEngine


@dataclasses.dataclass
class Comparison:
    """What was measured.

    Attributes:
        jobs: How many requests a round has.
        steps: Denoising steps of a round, over all its requests.
        together_s: Seconds of each round in the engine.
        alone_s: Seconds of each round of ``pipe(...)``, one request at a time.
        forwards: Forwards of the denoiser in one round in the engine, counted on the module itself.
        difference: Largest difference between the two ways' images, in grey levels of 255.
        where: Device, and threads where it is the CPU.
    """

    jobs: int
    steps: int
    together_s: list[float]
    alone_s: list[float]
    forwards: float
    difference: int
    where: str


async def compare(
    console: Console, engine: AsyncDiffusionEngine, pipe: Any, jobs: Sequence[Job], rounds: int
) -> Comparison:
    """Times ``rounds`` rounds of each way in turn. The engine is idle while ``pipe`` runs, and the other way round."""
    together: list[float] = []
    alone: list[float] = []
    shared: list[Image] = []
    single: list[Image] = []
    counted: list[int] = []
    with console.status("comparing") as status:
        status.update("warming up pipe(...)")
        await anyio.to_thread.run_sync(_alone, pipe, jobs[-1])
        for turn in range(1, rounds + 1):
            status.update(f"round {turn} of {rounds}: together")
            with _Forwards(pipe.transformer) as forwards:
                seconds, shared = await _timed_together(engine, jobs)
            together.append(seconds)
            counted.append(forwards.count)
            status.update(f"round {turn} of {rounds}: one at a time")
            start = time.perf_counter()
            single = [await anyio.to_thread.run_sync(_alone, pipe, job) for job in jobs]
            alone.append(time.perf_counter() - start)
    pairs = zip(shared, single, strict=True)
    return Comparison(
        jobs=len(jobs),
        steps=sum(job.steps for job in jobs),
        together_s=together,
        alone_s=alone,
        forwards=statistics.mean(counted),
        difference=max(_difference(left, right) for left, right in pairs),
        where=_where(pipe),
    )


def report(measured: Comparison) -> str:
    """The figures, and how they came about, for the console."""
    together, alone = statistics.median(measured.together_s), statistics.median(measured.alone_s)
    rounds = len(measured.together_s)
    forwards = f"({measured.steps} steps in {measured.forwards:.0f} forwards of the transformer)"
    lines = (
        "",
        f"[bold]together[/]       {together:6.2f} s   {_rounds(measured.together_s)}",
        f"[bold]one at a time[/]  {alone:6.2f} s   {_rounds(measured.alone_s)}",
        f"[bold green]{alone / together:.2f} times the throughput[/]",
        f"on average {measured.steps / measured.forwards:.1f} requests shared a forward {forwards}",
        f"largest difference between the two ways' images: {measured.difference} of 255 grey levels",
        f"[dim]how: medians of {rounds} rounds of each way in turn, the other way idle; the same pipeline object,",
        f"prompts, seeds, steps and guidance; {measured.where}; warmed up before[/]",
    )
    return "\n".join(lines)


def _rounds(seconds: Sequence[float]) -> str:
    return f"[dim](rounds: {', '.join(f'{one:.2f}' for one in seconds)})[/]"


async def _timed_together(engine: AsyncDiffusionEngine, jobs: Sequence[Job]) -> tuple[float, list[Image]]:
    images: dict[Job, Image] = {}

    async def one(job: Job) -> None:
        images[job] = (await engine.generate(job.prompt, seed=job.seed, **job.parameters)).images[0]

    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for job in jobs:
            tasks.start_soon(one, job)
    return time.perf_counter() - start, [images[job] for job in jobs]


def _alone(pipe: Any, job: Job) -> Image:
    import torch

    return pipe(job.prompt, generator=torch.Generator("cpu").manual_seed(job.seed), **job.parameters).images[0]


class _Forwards:
    """Counts a module's forwards while it is entered."""

    def __init__(self, module: Any) -> None:
        self.count = 0
        self._module = module

    def __enter__(self) -> _Forwards:
        self._hook = self._module.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _add(self, *_: object) -> None:
        self.count += 1


def _difference(left: Image, right: Image) -> int:
    one, other = (np.asarray(image, dtype=np.int16) for image in (left, right))
    return int(np.abs(one - other).max())


def _where(pipe: Any) -> str:
    import torch

    device = pipe.device
    if device.type == "cpu":
        return f"on the CPU with {torch.get_num_threads()} threads"
    return f"on {torch.cuda.get_device_name(device)}"
