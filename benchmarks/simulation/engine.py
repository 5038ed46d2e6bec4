"""The engine's loop on a virtual clock: arrivals, ticks, time-outs. The scheduler is the real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from heapq import heappop, heappush

from simulation.costs import CostTable
from simulation.worker import SimulatedWorker
from steploom.cli.benches.workloads import Arrival
from steploom.config import EngineConfig
from steploom.errors import DeadlineExceeded, RequestError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest, Failed, Finished
from steploom.sched import build_scheduler


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of a request.

    Attributes:
        arrival: What was asked for, and when.
        standalone_s: Seconds that it takes alone.
        ended: ``"finished"``, ``"refused"`` (at once), or ``"failed"`` (it timed out); empty while it is alive.
        latency_s: Seconds from arrival to its end.
    """

    arrival: Arrival
    standalone_s: float
    ended: str = ""
    latency_s: float = 0.0

    @property
    def slowdown(self) -> float:
        """Latency in parts of the standalone time; at least 1."""
        return self.latency_s / self.standalone_s

    def attained(self, slo: float) -> bool:
        """Whether it finished within its deadline, or within ``slo`` times its standalone time if it has none."""
        within_s = self.arrival.deadline or slo * self.standalone_s
        return self.ended == "finished" and self.latency_s <= within_s * (1 + 1e-9)


@dataclasses.dataclass
class Run:
    """One simulation: the outcomes of the requests that count, and what their ticks held.

    Attributes:
        outcomes: In the order of arrival, without those of the warm-up.
        ticks: Ticks with members since the warm-up ended.
        requests: Their members, summed.
        rows: The rows of these, summed.
        span_s: Virtual seconds from the first arrival that counts to the last end.
    """

    outcomes: list[Outcome]
    ticks: int = 0
    requests: int = 0
    rows: int = 0
    span_s: float = 0.0


class Stuck(RuntimeError):
    """The scheduler has work and plans nothing, although nobody else will arrive."""


class Simulation:
    """One workload on one scheduler.

    One tick is in flight at a time. What arrives or times out while it runs is told to the scheduler at its own time,
    and takes part in the next one.

    Args:
        arrivals: Ascending by time.
        costs: Seconds of a tick.
        config: Names scheduler and policy, and bounds them.
        warm_up: How many of the first arrivals are run but not counted.
        timeout: Seconds after which any request is given up; None is never.
    """

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        costs: CostTable,
        config: EngineConfig,
        *,
        warm_up: int = 0,
        timeout: float | None = None,
    ) -> None:
        self.now = 0.0
        self.scheduler = build_scheduler(config, lambda: self.now)
        self.worker = SimulatedWorker(costs)
        self.outcomes = [Outcome(arrival, costs.standalone_s(arrival)) for arrival in arrivals]
        self.warm_up = warm_up
        self.timeout = timeout
        self._arrived = 0
        self._timeouts: list[tuple[float, int]] = []
        self._run = Run(self.outcomes[warm_up:])

    def run(self) -> Run:
        """All of it.

        Raises:
            Stuck: The scheduler never plans a request that it has accepted.
        """
        scheduler = self.scheduler
        while True:
            self._happen(self.now)
            if not scheduler.has_work:
                if self._arrived == len(self.outcomes):
                    break
                self.now = self.outcomes[self._arrived].arrival.at_s
                continue
            self._tick()
        if self._run.outcomes:
            ends = [outcome.arrival.at_s + outcome.latency_s for outcome in self._run.outcomes]
            self._run.span_s = max(ends) - self._run.outcomes[0].arrival.at_s
        return self._run

    def _tick(self) -> None:
        output = self.scheduler.schedule()
        result = self.worker.execute(output)
        if not result.reports and not output.finished_req_ids:
            self._pass()
        until = self.now + result.seconds
        self._happen(until)
        self.now = until
        self._note(output, result)

    def _pass(self) -> None:
        """A tick without members: time goes on to what happens next."""
        times = [self._timeouts[0][0]] if self._timeouts else []
        if self._arrived < len(self.outcomes):
            times.append(self.outcomes[self._arrived].arrival.at_s)
        if not times:
            waiting, running = self.scheduler.num_waiting, self.scheduler.num_running
            raise Stuck(f"{waiting} requests wait and {running} run, and the scheduler plans none of them")
        self.now = max(self.now, min(times))

    def _happen(self, until: float) -> None:
        """Arrivals and time-outs up to then, each at its time."""
        outcomes, timeouts = self.outcomes, self._timeouts
        while True:
            at = outcomes[self._arrived].arrival.at_s if self._arrived < len(outcomes) else float("inf")
            if timeouts and timeouts[0][0] <= min(at, until):
                self.now, index = heappop(timeouts)
                self._time_out(index)
            elif at <= until:
                self.now = at
                self._arrive(self._arrived)
                self._arrived += 1
            else:
                return

    def _arrive(self, index: int) -> None:
        outcome = self.outcomes[index]
        request = as_request(outcome.arrival, str(index), self.timeout)
        try:
            self.scheduler.add_request(request)
        except RequestError:
            outcome.ended = "refused"
            return
        if self.timeout is not None:
            heappush(self._timeouts, (outcome.arrival.at_s + self.timeout, index))

    def _time_out(self, index: int) -> None:
        if self.outcomes[index].ended:
            return
        error = DeadlineExceeded(f"timeout={self.timeout}: the request has not finished by then")
        for event in self.scheduler.finish_requests([str(index)], error):
            assert isinstance(event, Failed)
            self._end(event.request_id, "failed")

    def _note(self, output: SchedulerOutput, result: RunnerOutput) -> None:
        """Tells the scheduler what the tick did, and takes down who ended."""
        for event in self.scheduler.update_from_output(output, result):
            kind = type(event)
            if kind is Finished or kind is Failed:
                self._end(event.request_id, "finished" if kind is Finished else "failed")
        if self._arrived > self.warm_up and result.reports:
            self._run.ticks += 1
            self._run.requests += len(result.reports)
            self._run.rows += sum([report.rows for report in result.reports])

    def _end(self, request_id: str, how: str) -> None:
        outcome = self.outcomes[int(request_id)]
        if outcome.ended:
            raise Stuck(f"request {request_id} ended twice: {outcome.ended}, then {how}")
        outcome.ended, outcome.latency_s = how, self.now - outcome.arrival.at_s


def as_request(arrival: Arrival, request_id: str, timeout: float | None) -> DiffusionRequest:
    """The request that a client would send."""
    return DiffusionRequest(
        "a simulated request",
        request_id=request_id,
        seed=0,
        user=arrival.user,
        priority=arrival.priority,
        deadline=arrival.deadline,
        timeout=timeout,
        width=arrival.width,
        height=arrival.height,
        num_inference_steps=arrival.steps,
        num_images_per_prompt=arrival.images,
        guidance_scale=4.0,
    )
