"""Counters: what a hub did, of which the worker's figures are made."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator

from steploom.protocol import RequestReport, RunnerOutput
from steploom.weave.batching.unlike import ONLY_ONE
from steploom.weave.order import is_denoiser


@dataclasses.dataclass
class Counters:
    """What the hub did since its start; seconds of the tick in progress.

    ``denoiser_forwards`` is how many denoiser forwards carried how many requests, ``denoiser_alone`` why those of one
    were made for it alone.
    """

    merged_calls: int = 0
    denoiser_forwards: dict[int, int] = dataclasses.field(default_factory=dict)
    denoiser_alone: dict[str, int] = dataclasses.field(default_factory=dict)
    alone_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    alone_this_tick: dict[str, int] = dataclasses.field(default_factory=dict)
    forward_s: float = 0.0
    chores_s: float = 0.0
    warmup_s: float = 0.0
    too_many_rows: int = 0

    def forget(self) -> None:
        """Forgets what was counted so far."""
        self.__dict__.update(Counters().__dict__)

    def absorb(self, other: Counters) -> None:
        """Counts what ``other`` has counted, which is forgotten there; seconds are not."""
        self.merged_calls += other.merged_calls
        for own, theirs in ((self.alone_calls, other.alone_calls), (self.alone_this_tick, other.alone_this_tick)):
            for reason, calls in theirs.items():
                own[reason] = own.get(reason, 0) + calls
        other.forget()

    def begin_tick(self) -> None:
        """A tick begins."""
        self.forward_s = self.chores_s = self.warmup_s = 0.0
        self.alone_this_tick, self.too_many_rows = {}, 0

    @contextlib.contextmanager
    def warming(self) -> Generator[None]:
        """What is done within belongs to no request."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.warmup_s += time.perf_counter() - started

    def forward(self, name: str, requests: int) -> None:
        """A forward of the component ``name`` carried ``requests`` requests."""
        if is_denoiser(name):
            self.denoiser_forwards[requests] = self.denoiser_forwards.get(requests, 0) + 1

    def overflowed(self, rows: int) -> None:
        """A denoiser's forward of so many rows ran out of memory."""
        self.too_many_rows = min(rows, self.too_many_rows or rows)

    def answer(self, tick: int, reports: list[RequestReport], seconds: float) -> RunnerOutput:
        """What a worker says of a tick that took so many seconds."""
        return RunnerOutput(
            tick=tick,
            reports=reports,
            seconds=seconds,
            forward_s=self.forward_s,
            chores_s=self.chores_s,
            warmup_s=self.warmup_s,
            too_many_rows=self.too_many_rows,
            alone=self.alone_this_tick,
        )

    def chore(self, seconds: float) -> None:
        """Of the tick, so long was spent in text encoders and VAEs."""
        self.forward_s += seconds
        self.chores_s += seconds

    def alone(self, name: str, reason: str) -> None:
        """A call of the component ``name`` was run alone."""
        self.alone_calls[reason] = self.alone_calls.get(reason, 0) + 1
        if reason != ONLY_ONE:
            self.alone_this_tick[reason] = self.alone_this_tick.get(reason, 0) + 1
        if is_denoiser(name):
            self.denoiser_alone[reason] = self.denoiser_alone.get(reason, 0) + 1
        self.forward(name, 1)
