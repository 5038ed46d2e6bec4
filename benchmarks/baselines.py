"""What applications do without an engine, written as well as it can be: the baselines of ``latency.py``.

Each is a target of ``steploom.cli.benches.load``: ``async with Baseline(pipe, asking) as target: await target.send()``.
All run the same pipeline object's modules with the engine's prompts, seeds and steps, with one torch thread a call.

``Locked``         ``pipe(...)`` in a worker thread behind an asyncio lock: one at a time, first come first served.
``Pool``           a thread pool; each request has a pipeline of its own over the same weights, with its own noise
                   scheduler. As many threads as cores, and one torch thread each: it may use every core.
``StaticBatches``  what waits of one shape (size and steps) runs as one ``pipe([prompts], generator=[...])`` to the end;
                   the shape whose oldest request came first is next; ``most`` requests at most.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, Self

import anyio
import anyio.to_thread
import torch

from steploom.cli.benches.load import Answer
from steploom.cli.benches.targets import Asking
from steploom.cli.benches.workloads import Arrival


def call(pipe: Any, asking: Asking, members: Sequence[tuple[int, Arrival]]) -> None:
    """``pipe(...)`` for requests of one shape, each with its own prompt and generator."""
    prompts = [asking.prompt_of(index) for index, _ in members]
    generators = [torch.Generator("cpu").manual_seed(asking.seed_of(index)) for index, _ in members]
    one = members[0][1]
    pipe(
        prompt=prompts if len(prompts) > 1 else prompts[0],
        generator=generators if len(generators) > 1 else generators[0],
        num_inference_steps=one.steps,
        width=one.width,
        height=one.height,
        **({"num_images_per_prompt": one.images} if one.images > 1 else {}),
        **asking.params,
    )


class Locked:
    """One at a time. ``busy_s``: seconds that it has run; by those of a load, what its load really was."""

    def __init__(self, pipe: Any, asking: Asking) -> None:
        self._pipe, self._asking = pipe, asking
        self._lock = asyncio.Lock()  # noqa: TID251 - the very thing that is compared with
        self.busy_s = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def send(self, index: int, arrival: Arrival) -> Answer:
        async with self._lock:
            began = time.monotonic()
            await anyio.to_thread.run_sync(call, self._pipe, self._asking, [(index, arrival)])
            self.busy_s += time.monotonic() - began
        return Answer(steps=arrival.steps, images=arrival.images, mean_batch_requests=1.0)


class Pool:
    """Some at a time, each in a thread, with a pipeline of its own over shared weights.

    Tokenizers are copied as well, once for each thread: fast ones keep truncation and padding as state, and two threads
    that share one get each other's.
    """

    def __init__(self, pipe: Any, asking: Asking, workers: int | None = None) -> None:
        self._asking = asking
        count = workers or os.cpu_count() or 1
        self._places = anyio.CapacityLimiter(count)
        self._free = [self._copy(pipe, "tokenizer") for _ in range(count)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def send(self, index: int, arrival: Arrival) -> Answer:
        await anyio.to_thread.run_sync(self._call, index, arrival, limiter=self._places)
        return Answer(steps=arrival.steps, images=arrival.images, mean_batch_requests=1.0)

    def _call(self, index: int, arrival: Arrival) -> None:
        own = self._free.pop()  # there are as many as threads
        try:
            call(self._copy(own, "scheduler"), self._asking, [(index, arrival)])
        finally:
            self._free.append(own)

    @staticmethod
    def _copy(pipe: Any, kind: str) -> Any:
        """A pipeline over the same components, but for copies of those whose names begin so."""
        parts = {name: copy.deepcopy(part) if name.startswith(kind) else part for name, part in pipe.components.items()}
        made = type(pipe)(**parts)
        made.set_progress_bar_config(disable=True)
        return made


@dataclasses.dataclass
class _Waiting:
    index: int
    arrival: Arrival
    done: anyio.Event
    mates: int = 0
    error: Exception | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.arrival
        return one.width, one.height, one.steps, one.images


class StaticBatches:
    """What waits of one shape, together, to the end."""

    def __init__(self, pipe: Any, asking: Asking, most: int = 16) -> None:
        self._pipe, self._asking, self._most = pipe, asking, most
        self._waiting: list[_Waiting] = []
        self._came = anyio.Event()
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._run)
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        self._group.cancel_scope.cancel()
        return await self._group.__aexit__(*error)

    async def send(self, index: int, arrival: Arrival) -> Answer:
        waiting = _Waiting(index, arrival, anyio.Event())
        self._waiting.append(waiting)
        self._came.set()
        try:
            await waiting.done.wait()
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        if waiting.error is not None:
            raise waiting.error
        return Answer(steps=arrival.steps, images=arrival.images, mean_batch_requests=float(waiting.mates))

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            batch = [one for one in self._waiting if one.shape == self._waiting[0].shape][: self._most]
            self._waiting = [one for one in self._waiting if one not in batch]
            if not self._waiting:
                self._came = anyio.Event()
            if batch:
                await self._make(batch)

    async def _make(self, batch: list[_Waiting]) -> None:
        error: Exception | None = None
        try:
            members = [(one.index, one.arrival) for one in batch]
            await anyio.to_thread.run_sync(call, self._pipe, self._asking, members)
        except Exception as raised:  # noqa: BLE001 - raised in each of those who wait
            error = raised
        for one in batch:
            one.mates, one.error = len(batch), error
            one.done.set()
