"""What an engine's observer knows that no client does: join delays in steps, and rows of a merged call."""

from __future__ import annotations

import dataclasses
from typing import Any

from steploom.cli.benches.figures import percentile, spread
from steploom.engine.observer import EngineObserver
from steploom.errors import SteploomError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest


@dataclasses.dataclass(frozen=True)
class Join:
    """A request has joined.

    Attributes:
        request_id: Whose.
        delay_steps: Steps that any running request made between its acceptance and the tick that it joined in, at
            most. The step that was under way when it came is one of them.
        slot_free: Whether, when it was accepted, all who were there already had room in one batch beside it.
    """

    request_id: str
    delay_steps: int
    slot_free: bool


class Joins(EngineObserver):
    """Observes an engine: append it to ``engine.observers`` before the load, then read :meth:`figures`.

    Args:
        max_batch: Requests that share a tick, at most; None where there is no such number.

    Attributes:
        joins: Of the requests that have joined.
        ticks: Ticks that stepped a request.
    """

    def __init__(self, max_batch: int | None = None) -> None:
        self.joins: list[Join] = []
        self.ticks = 0
        self._max_batch = max_batch
        self._steps: dict[str, int] = {}
        self._waiting: dict[str, tuple[dict[str, int], bool]] = {}
        self._running: set[str] = set()
        self._rows = self._calls = 0.0

    def on_queued(self, request: DiffusionRequest) -> None:
        """Notes how many steps everybody has made."""
        there = len(self._running) + len(self._waiting)
        free = self._max_batch is not None and there < self._max_batch
        self._waiting[request.request_id] = (dict(self._steps), free)

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """Who has joined in this tick has waited for the steps of the ticks before it."""
        for report in result.reports:
            if report.stage:  # it has none while the worker has no place for it
                self._join(report.run_id.partition("#")[0])
        stepped = [report for report in result.reports if report.stepped]
        for report in stepped:
            name = report.run_id.partition("#")[0]
            self._steps[name] = self._steps.get(name, 0) + 1
        shared = [report for report in stepped if report.batch_requests]
        self._rows += sum(report.rows for report in shared)
        self._calls += sum(1 / report.batch_requests for report in shared)
        self.ticks += bool(stepped)

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """Forgets the request; the steps of those who are gone, once nobody waits who has seen them."""
        self._waiting.pop(request_id, None)
        self._running.discard(request_id)
        if not self._waiting:
            self._steps = {name: count for name, count in self._steps.items() if name in self._running}

    def _join(self, name: str) -> None:
        if name not in self._waiting:
            return
        before, free = self._waiting.pop(name)
        delay = max((count - before.get(other, 0) for other, count in self._steps.items()), default=0)
        self._running.add(name)
        self.joins.append(Join(name, delay, free))

    @property
    def mean_rows(self) -> float | None:
        """Rows of a denoiser call on average, as many as were merged; None if none was seen."""
        return self._rows / self._calls if self._calls else None

    def figures(self) -> dict[str, Any]:
        """``mean_rows``, join delays in steps of all, and of those for whom a slot was free."""
        delays = [float(join.delay_steps) for join in self.joins]
        free = [float(join.delay_steps) for join in self.joins if join.slot_free]
        return {
            "mean_rows": self.mean_rows,
            "ticks": self.ticks,
            **spread("join_delay_steps", delays),
            "joins_with_slot_free": len(free),
            "p99_join_delay_steps_slot_free": percentile(free, 99) if free else None,
            "max_join_delay_steps_slot_free": max(free, default=None),
        }
