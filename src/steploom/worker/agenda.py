"""Agenda: what a tick is by the time it begins, which may be more, or less, than it was when it was sent."""

from __future__ import annotations

from steploom.protocol import NewRequest, RequestReport, RunnerOutput, SchedulerOutput


class Agenda:
    """Keeps what was said about ticks that have not begun, and which programs the worker holds.

    The engine sends a tick while the one before it runs, and amends it when requests arrive or end meanwhile. What
    arrives before the tick begins is part of it. What comes too late waits: those who join for the first tick that
    names them, those who end for the next tick, whichever that is.

    The engine also plans for requests to be gone that are in their last step. Where one turns out to stay, the request
    that was to take its place waits here, so that the runner never holds more than ``limit``. The answer names no stage
    for it, so that the engine plans for those that the runner holds until there is a place.

    Args:
        limit: Requests that the runner may hold; None for any number.

    Attributes:
        ended: Run ids that the runner may forget, and that came too late for the tick that was to say so.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.ended: list[str] = []
        self._limit = limit
        self._begun = 0
        self._held: set[str] = set()
        self._amendments: list[SchedulerOutput] = []
        self._waiting: dict[str, NewRequest] = {}
        self._kept_out: list[str] = []

    @property
    def busy(self) -> bool:
        """Whether a program is resident, or waits to be: so that there is a tick to wait for."""
        return bool(self._held or self._waiting)

    def amend(self, amendment: SchedulerOutput) -> None:
        """Takes what is added to a tick, which may have begun, or not even have arrived."""
        if amendment.tick > self._begun:
            self._amendments.append(amendment)
        else:
            self._waiting.update((new.run_id, new) for new in amendment.scheduled_new_reqs)
            self.ended += amendment.finished_req_ids

    def begin(self, output: SchedulerOutput) -> tuple[SchedulerOutput, int]:
        """The tick as the runner is to execute it, and how many amendments are in it."""
        self._begun, amended = output.tick, 0
        if self._amendments:
            waiting, self._amendments = self._amendments, []
            for amendment in waiting:
                if amendment.tick == output.tick:
                    output = output.amended(amendment)
                    amended += 1
                else:
                    self.amend(amendment)
        if self._waiting or self.ended or output.scheduled_new_reqs or output.finished_req_ids:
            output = self._placed(output)
        return output, amended

    def forget(self) -> SchedulerOutput:
        """An empty tick for those that ended too late, to be executed where no other one is at hand."""
        return self._placed(SchedulerOutput(self._begun))

    def forget_all(self) -> SchedulerOutput:
        """An empty tick that ends whoever the runner holds: their engine is gone."""
        self.ended += sorted(self._held)
        return self.forget()

    def _placed(self, output: SchedulerOutput) -> SchedulerOutput:
        """The tick with those that waited for it, and without those for whom there is no place."""
        gone, self.ended = [*self.ended, *output.finished_req_ids], []
        held, waiting = self._held, self._waiting
        for run in gone:
            waiting.pop(run, None)
            held.discard(run)
        cached = [run for run in output.scheduled_cached_reqs if run not in waiting]
        joining = [waiting.pop(run) for run in output.scheduled_cached_reqs if run in waiting]
        joining += output.scheduled_new_reqs
        room = len(joining) if self._limit is None else max(0, self._limit - len(held))
        for new in joining[room:]:
            waiting[new.run_id] = new
            self._kept_out.append(new.run_id)
        del joining[room:]
        held.update(new.run_id for new in joining)
        return SchedulerOutput(output.tick, joining, cached, gone, output.batch_key)

    def end(self, output: SchedulerOutput, result: RunnerOutput, amended: int) -> None:
        """Notes whom the runner holds no more, and says in its answer who was kept out and what was in time."""
        for report in result.reports:
            if report.finished:
                self._held.discard(report.run_id)
        if len(result.reports) < len(output.scheduled_cached_reqs) + len(output.scheduled_new_reqs):
            self._held.difference_update(set(output.run_ids) - {report.run_id for report in result.reports})
        result.amendments = amended
        result.reports += [RequestReport(run_id=run, stage="") for run in self._kept_out]
        self._kept_out = []
