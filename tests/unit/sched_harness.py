"""A scheduler, a clock that is set by hand, and answers as a worker would give them."""

from __future__ import annotations

from typing import Any

from steploom.config import EngineConfig
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest, Event
from steploom.sched import build_scheduler


class Harness:
    """Every request takes ``steps[name]`` ticks (2 if not given) and reports ``key<height>`` as its batch key."""

    def __init__(self, **config: Any) -> None:
        self.now = 0.0
        self.scheduler = build_scheduler(EngineConfig(**{"max_batch": 8, "policy": "fcfs", **config}), lambda: self.now)
        self.steps: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.heights: dict[str, Any] = {}
        self.keys: dict[str, str] = {}

    def add(self, *names: str, steps: int = 2, height: Any = 512, **own: Any) -> None:
        for name in names:
            self.steps[name], self.heights[name] = steps, height
            self.scheduler.add_request(DiffusionRequest(name, seed=1, request_id=name, height=height, **own))

    def report(self, run: str, **fields: Any) -> RequestReport:
        """What a worker says about one step of one attempt."""
        name = request_id_of(run)
        self.done[run] = self.done.get(run, 0) + 1
        values = {
            "phase": "denoise",
            "stepped": True,
            "step": self.done[run],
            "batch_key": self.keys.get(name, f"key{self.heights[name]}"),
            "batch_requests": 1,
            "finished": self.done[run] >= self.steps[name],
        }
        return RequestReport(run_id=run, **{**values, **fields})

    def answer(self, output: SchedulerOutput, /, *, without: tuple[str, ...] = (), **fields: Any) -> list[Event]:
        """The worker's answer to ``output``, one report per member except for those in ``without``."""
        runs = [run for run in output.run_ids if request_id_of(run) not in without]
        reports = [self.report(run, **fields) for run in runs]
        return self.scheduler.update_from_output(output, RunnerOutput(tick=output.tick, reports=reports))

    def tick(self, **fields: Any) -> tuple[list[str], list[Event]]:
        """A whole tick: its members by name, and the events."""
        output = self.scheduler.schedule()
        return names(output), self.answer(output, **fields)

    def drain(self, limit: int = 1000) -> int:
        """Ticks until no work is left."""
        for ticks in range(limit):
            if not self.scheduler.has_work:
                return ticks
            self.tick()
        raise AssertionError(f"still busy after {limit} ticks")


def names(output: SchedulerOutput) -> list[str]:
    """The members of a tick by name."""
    return [request_id_of(run) for run in output.run_ids]
