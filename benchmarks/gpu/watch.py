"""What the engine tells while it is measured: when ticks began and ended, and who was in them."""

from __future__ import annotations

import itertools
import time

import anyio

from steploom import EngineObserver
from steploom.protocol import RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest


class Watch(EngineObserver):
    """An observer that keeps everything; one for each engine that is measured. Times are of ``time.monotonic()``."""

    def __init__(self) -> None:
        self.queued: dict[str, float] = {}
        self.schedules: list[tuple[float, SchedulerOutput]] = []
        self.ticks: list[tuple[float, float, SchedulerOutput, RunnerOutput]] = []
        self._turn = anyio.Event()

    def clear(self) -> None:
        """Forgets what was."""
        self.queued.clear()
        self.schedules.clear()
        self.ticks.clear()

    def on_queued(self, request: DiffusionRequest) -> None:
        self.queued[request.request_id] = time.monotonic()

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        self.schedules.append((at, output))

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        self.ticks.append((began, ended, output, result))
        self._turn.set()
        self._turn = anyio.Event()

    async def pass_ticks(self, count: int) -> None:
        """Returns when that many more ticks are over."""
        for _ in range(count):
            await self._turn.wait()

    async def forgotten(self, request_id: str) -> None:
        """Returns when the tick is over that told the workers to forget the request."""
        while not any(request_id in map(request_id_of, output.finished_req_ids) for _, _, output, _ in self.ticks):
            await self._turn.wait()

    def join(self, request_id: str) -> dict[str, float]:
        """How long the request waited for its first tick: in ticks begun (1 is the next one) and milliseconds; and how
        long until the tick was over that ended its first step."""
        submitted = self.queued[request_id]
        later = [(at, output) for at, output in self.schedules if at >= submitted]
        ticks, joined = next(
            (place, at)
            for place, (at, output) in enumerate(later, start=1)
            if any(new.request.request_id == request_id for new in output.scheduled_new_reqs)
        )
        stepped = next(
            ended
            for _, ended, _, result in self.ticks
            if any(request_id_of(report.run_id) == request_id and report.step > 0 for report in result.reports)
        )
        return {
            "ticks": ticks,
            "to_first_tick_ms": 1000 * (joined - submitted),
            "to_first_step_ms": 1000 * (stepped - submitted),
        }

    def cancel(self, request_id: str, asked: float) -> dict[str, float]:
        """Ticks that still began with the request after it was ended at ``asked``, and milliseconds until the tick
        began that told the workers to forget it."""
        later = [output for at, output in self.schedules if at >= asked]
        told = next(
            at
            for at, output in self.schedules
            if at >= asked and request_id in map(request_id_of, output.finished_req_ids)
        )
        with_it = sum(request_id in map(request_id_of, output.run_ids) for output in later)
        return {"ticks_begun_with_it": with_it, "to_freed_ms": 1000 * (told - asked)}

    def periods(self) -> list[float]:
        """Seconds from the end of each tick to the end of the next."""
        ends = [ended for _, ended, _, _ in self.ticks]
        return [later - earlier for earlier, later in itertools.pairwise(ends)]

    def idle(self) -> list[float]:
        """Seconds of each period that the worker did not spend in the tick: it waited for the engine."""
        spent = [result.seconds for _, _, _, result in self.ticks[1:]]
        return [max(0.0, period - inside) for period, inside in zip(self.periods(), spent, strict=True)]
