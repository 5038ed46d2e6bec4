"""What an engine's ticks took, for ``steploom bench``."""

from __future__ import annotations

from steploom.engine.observer import EngineObserver
from steploom.protocol import RunnerOutput, SchedulerOutput


class Ticks(EngineObserver):
    """Observes an engine's ticks: the engine's share of each is what it takes beyond the worker's seconds."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, float, bool]] = []

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """Notes a tick."""
        steady = not output.scheduled_new_reqs and not any(report.finished for report in result.reports)
        self.spans.append((ended - began, result.seconds, result.forward_s, steady))
