"""The world in which the scheduler is tested: an engine, a worker that holds programs, and what they know.

It knows each program's course, and so what the scheduler must have decided; it shares no code with the scheduler.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import pytest
from programs import Flight, Known, Program, begin, true_key
from remembered import check_remembered
from suspicions import Suspicions

from steploom.config import EngineConfig
from steploom.errors import GenerationFailed, InvalidRequest, QueueFull, RequestCancelled
from steploom.protocol import ErrorInfo, RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest, Event, Failed, Finished, Queued, Restarted, StepEvent
from steploom.sched import build_scheduler

MAX_WAITING = 6
MAX_RETRIES = 1
SHAPES = 4


class World:
    """An engine and its worker.

    Args:
        stable: Whether requests of one shape have one observed key, as most pipelines have; else keys are erratic.
    """

    def __init__(self, scheduler: str, max_batch: int, spare: int, stable: bool, policy: str, preempt: bool) -> None:
        self.now = 0.0
        self.stable = stable
        order = {"policy": policy, "preempt": preempt, "priority_ageing_s": 1e9}
        limits = {"max_resident": max_batch + spare, "max_waiting": MAX_WAITING, "max_retries": MAX_RETRIES}
        config = EngineConfig(scheduler=scheduler, max_batch=max_batch, memory_share=1.0, **limits, **order)
        self.policy, self.preempt = policy, preempt
        self.scheduler = build_scheduler(config, lambda: self.now)
        self.max_batch = max_batch if scheduler == "step" else 1
        self.limit = max_batch + spare if scheduler == "step" else 1
        self.live: dict[str, Known] = {}
        self.owed: set[str] = set()  # run ids that a worker must be told to forget
        self.told: set[str] = set()
        self.sent: set[str] = set()
        self.learned: set[int] = set()  # shapes of which a key was reported
        self.flights: deque[Flight] = deque()
        self.stale: list[Flight] = []  # ticks of a dead worker
        self.held: dict[str, int] = {}  # the worker's programs: run id to ticks done
        self.programs: dict[str, Program] = {}  # what runs under a run id
        self.arrivals = 0
        self.suspicions = Suspicions(MAX_RETRIES)

    @property
    def waiting(self) -> dict[str, Known]:
        return {name: known for name, known in self.live.items() if known.run is None}

    @property
    def resident(self) -> dict[str, Known]:
        return {known.run: known for known in self.live.values() if known.run is not None}

    def submit(self, name: str, program: Program) -> None:
        hints = {"user": (None, "ann", "bob")[self.arrivals % 3], "deadline": (None, 0.1, 9.0, 99.0)[self.arrivals % 4]}
        shape = {"height": 64 * program.shape, "width": 64, "num_inference_steps": 4}
        request = DiffusionRequest(name, seed=1, request_id=name, priority=program.priority, **shape, **hints)
        waiting = len(self.waiting)
        if name in self.live:
            with pytest.raises(InvalidRequest):
                self.scheduler.add_request(request)
        elif waiting >= MAX_WAITING:
            with pytest.raises(QueueFull):
                self.scheduler.add_request(request)
        else:
            assert self.scheduler.add_request(request) == Queued(request_id=name, position=waiting)
            self.live[name] = Known(program, self.arrivals, self.now)
            self.arrivals += 1

    def abort(self, names: list[str]) -> None:
        alive, error = [name for name in dict.fromkeys(names) if name in self.live], RequestCancelled("enough")
        events = self.scheduler.finish_requests(names, error)
        assert events == [Failed(request_id=name, error=error) for name in alive]
        for name in alive:
            known = self.live.pop(name)
            self.suspicions.forget(name)
            if known.run is not None:
                self.owed.add(known.run)

    def schedule(self) -> SchedulerOutput:
        waiting, resident = self.waiting, self.resident
        output = self.scheduler.schedule()
        joined = [request_id_of(new.run_id) for new in output.scheduled_new_reqs]
        self._check_capacity(output, joined, waiting, resident)
        self._check_forget(output)
        steps = self._steps(self.resident.values())
        self.suspicions.looks(steps)
        for new, name in zip(output.scheduled_new_reqs, joined, strict=True):
            known = self.live[name]
            self.suspicions.joins(name, [other for other in steps if other not in joined])
            assert new.request.request_id == name
            assert new.run_id not in self.sent, "run ids are never used twice"
            self.sent.add(new.run_id)
            known.run = new.run_id
            self.programs[new.run_id] = known.program
            if known.queued_s is None:
                known.queued_s = self.now - known.submitted
        self._check_batch(output)
        self._check_conservation(output, waiting, resident)
        self._check_order(joined)
        self.flights.append(Flight(output))
        return output

    def _check_capacity(self, output: SchedulerOutput, joined: list[str], waiting: object, resident: object) -> None:
        members = [*output.scheduled_cached_reqs, *joined]
        assert len(set(members)) == len(members) <= self.max_batch
        assert set(joined) <= set(self.waiting)
        assert set(output.scheduled_cached_reqs) <= set(self.resident)
        assert len(self.resident) + len(joined) <= self.limit

    def _check_forget(self, output: SchedulerOutput) -> None:
        told = output.finished_req_ids
        assert len(set(told)) == len(told)
        assert set(told) == self.owed, "workers are told to forget exactly what they hold"
        assert not self.told & self.owed, "and once"
        assert self.owed <= self.sent
        self.told |= self.owed
        self.owed.clear()

    def _check_batch(self, output: SchedulerOutput) -> None:
        members = [self.resident[run] for run in output.run_ids]
        observed = {known.observed for known in members} - {None}
        if output.batch_key is None:
            assert not observed
            assert len({known.program.shape for known in members}) <= 1
        else:
            assert observed <= {output.batch_key}
        if self.stable and output.batch_key is not None:
            assert {true_key(known.program.shape) for known in members} == {output.batch_key}

    def _check_conservation(self, output: SchedulerOutput, waiting: dict[str, Known], resident: object) -> None:
        members = set(output.run_ids)
        if resident or waiting:
            assert members, "something can run, and nothing does"
        if len(members) == self.max_batch:
            return
        for run, known in () if self.preempt else self.resident.items():
            assert run in members or not self._belongs(known, output), f"{run} could have stepped"
        apart = any(map(self.suspicions.spent, self.live))
        if len(self.resident) < self.limit and not apart and not self._kept_free(output):
            for name, known in self.waiting.items():
                assert not self._belongs(known, output), f"{name} could have joined"

    def _kept_free(self, output: SchedulerOutput) -> bool:
        """Whether free places may be kept, for others: a full batch at most, or, of too few for all, for users."""
        others = [known for known in self.waiting.values() if not self._belongs(known, output)]
        if others and self.max_batch > 1 and len(self.resident) >= max(1, self.limit - self.max_batch):
            return True
        users = {known.arrival % 3 for known in self.waiting.values()}
        return bool(others) and len(users) > 1 and len(self.waiting) > self.limit - len(self.resident)

    def _belongs(self, known: Known, output: SchedulerOutput) -> bool:
        """Whether the request is known to share the tick's batch key."""
        if known.observed is not None:
            return known.observed == output.batch_key
        if output.batch_key is None:
            return known.program.shape in {self.resident[run].program.shape for run in output.run_ids}
        return self.stable and known.program.shape in self.learned and true_key(known.program.shape) == output.batch_key

    def _check_order(self, joined: list[str]) -> None:
        """Within a guess: lower priority first; of fcfs and a user replays before others, then first come first."""

        def rank(known: Known, other: Known) -> tuple[int, ...]:
            if self.policy != "fcfs" or (known.arrival - other.arrival) % 3:  # the user is by arrival
                return (known.program.priority,)
            return known.program.priority, -bool(known.replays), 0 if known.replays else known.arrival

        apart = any(map(self.suspicions.spent, self.live))
        for one in () if apart else (self.live[name] for name in joined):
            behind = [known for known in self.waiting.values() if known.program.shape == one.program.shape]
            assert all(rank(one, known) <= rank(known, one) for known in behind)

    def execute(self) -> None:
        flight = next(flight for flight in self.flights if flight.result is None)
        output = flight.output
        for run in output.finished_req_ids:
            self.held.pop(run, None)
        for new in output.scheduled_new_reqs:
            self.held[new.run_id] = 0
        assert len(self.held) <= self.limit
        here = [run for run in output.run_ids if run in self.held]
        if any(self.programs[run].kills == self.held[run] for run in here):
            self.die(by_name=False, by_chance=False)
            return
        reports = [self._advance(run, len(here)) for run in here]
        flight.result = RunnerOutput(tick=output.tick, reports=reports, seconds=0.5 + len(here))

    def _advance(self, run: str, mates: int) -> RequestReport:
        program, done = self.programs[run], self.held[run]
        key = program.keys[done]
        self.held[run] = done + 1
        report = RequestReport(run_id=run, batch_key=key, stepped=key is not None, step=done + 1, total_steps=None)
        if done == 0 or key is None:
            report.encode_s = 0.5  # Also in the tick of the first denoiser call.
        if key is not None:
            report.phase, report.batch_requests, report.rows, report.denoise_s = "denoise", mates, 1, 0.25
        if done + 1 == len(program.keys):
            del self.held[run]
            report.finished, report.decode_s = True, 0.125
            report.output = None if program.fails else f"image of {run}"
            report.error = ErrorInfo("GenerationFailed", "poison") if program.fails else None
        return report

    def answer(self) -> None:
        flight = self.flights.popleft()
        assert flight.result is not None
        expected: list[Event | type[Event]] = []
        mentioned = {report.run_id for report in flight.result.reports}
        lost = [known for run, known in self.resident.items() if run in set(flight.output.run_ids) - mentioned]
        for report in flight.result.reports:
            known = self.resident.get(report.run_id)
            if known is None:
                if report.finished:
                    self.owed.discard(report.run_id)
                continue
            expected += self._expect(known, report)
        begin(self.flights, self.live, self.now)
        events = self.scheduler.update_from_output(flight.output, flight.result)
        self._compare(events[: len(expected)], expected)
        names = [request_id_of(known.run or "") for known in lost]
        self._replayed(events[len(expected) :], lost, {name for name in names if self.suspicions.lost(name)})

    def _expect(self, known: Known, report: RequestReport) -> list[tuple[type, str, Known, RequestReport]]:
        name = request_id_of(report.run_id)
        known.reports.append(report)
        if report.batch_key is not None:
            known.observed = report.batch_key
            self.learned.add(known.program.shape)
        expected = [(StepEvent, name, known, report)] if report.stepped else []
        if report.finished:
            del self.live[name]
            self.suspicions.forget(name)
            expected.append((Failed if report.error else Finished, name, known, report))
        return expected

    def _compare(self, events: list[Event], expected: list[tuple[type, str, Known, RequestReport]]) -> None:
        assert [(type(event), event.request_id) for event in events] == [entry[:2] for entry in expected]
        for event, (_, _, known, report) in zip(events, expected, strict=True):
            if isinstance(event, StepEvent):
                assert (event.step, event.batch_requests) == (report.step, report.batch_requests)
            elif isinstance(event, Failed):
                assert isinstance(event.error, GenerationFailed)
            elif isinstance(event, Finished):
                self._check_timings(event, known)

    def _check_timings(self, event: Finished, known: Known) -> None:
        timings, reports = event.output.timings, known.reports
        shares = [report.batch_requests for report in reports if report.batch_requests]
        assert event.output.output == f"image of {known.run}"
        assert timings.queued_s == known.queued_s
        assert timings.total_s == self.now - known.submitted
        assert timings.encode_s == sum(report.encode_s for report in reports)
        assert timings.denoise_s == sum(report.denoise_s for report in reports)
        assert timings.decode_s == sum(report.decode_s for report in reports)
        assert timings.steps == sum(report.stepped for report in reports)
        assert timings.mean_batch_requests == (sum(shares) / len(shares) if shares else 0.0)

    def lose(self, runs: list[str]) -> None:
        """The worker drops programs and does not say so."""
        self.suspicions.by_chance |= bool(runs)
        for run in runs:
            self.held.pop(run, None)

    def die(self, by_name: bool, by_chance: bool = True) -> None:
        """The worker ends, with all that it holds; its answers may still arrive."""
        self.suspicions.by_chance |= by_chance
        flying = Counter(run for flight in self.flights for run in flight.output.run_ids)
        self.stale = [flight for flight in self.flights if flight.result is not None]
        self.flights.clear()
        self.held.clear()
        lost = list(self.resident.values())
        suspects = {request_id_of(run): ticks for run, ticks in flying.items() if run in self.resident}
        ghosts = len(suspects) < len(flying)
        guilty = self.suspicions.death(suspects, self._steps(lost), ghosts=ghosts)
        if by_name:
            events = self.scheduler.restart([request_id_of(known.run or "") for known in lost] + ["unknown"])
        else:
            events = self.scheduler.restart()
            self.owed.clear()
        self._replayed(events, lost, guilty)

    def _steps(self, residents: Iterable[Known]) -> dict[str, int]:
        """The steps of residents, by name, as far as they were reported."""
        return {request_id_of(one.run or ""): sum(report.stepped for report in one.reports) for one in residents}

    def _replayed(self, events: list[Event], lost: list[Known], guilty: set[str]) -> None:
        lost.sort(key=lambda known: known.arrival)
        assert [event.request_id for event in events] == [request_id_of(known.run or "") for known in lost]
        for event, known in zip(events, lost, strict=True):
            if event.request_id in guilty:
                assert isinstance(event, Failed)
                assert isinstance(event.error, GenerationFailed)
                self.suspicions.blames(event.request_id, killer=known.program.kills is not None)
                self.suspicions.forget(event.request_id)
                del self.live[event.request_id]
            else:
                known.replays += 1
                assert event == Restarted(request_id=event.request_id, attempt=known.replays)
                known.run = known.observed = None
                known.reports = []

    def answer_stale(self) -> None:
        flight = self.stale.pop(0)
        assert flight.result is not None
        assert self.scheduler.update_from_output(flight.output, flight.result) == [], "late attempts are ignored"
        self.owed.difference_update(report.run_id for report in flight.result.reports if report.finished)

    def check(self) -> None:
        assert self.scheduler.num_waiting == len(self.waiting)
        assert self.scheduler.num_running == len(self.resident) <= self.limit
        assert self.scheduler.has_work == bool(self.live or self.owed)
        check_remembered(self.scheduler.policy)
        if not self.flights and not self.owed:
            assert set(self.held) <= set(self.resident)

    def drain(self) -> None:
        """Without further arrivals everything ends, and no tick is idle: each one advances a program."""
        while self.flights:
            self._end_tick()
        killers = sum(known.program.kills is not None for known in self.live.values())
        rounds = MAX_RETRIES + 1 + 2 * killers * (MAX_RETRIES + 1 + len(self.live).bit_length())
        budget = 1 + rounds * sum(1 + len(known.program.keys) for known in self.live.values())
        for _ in range(budget):
            if not self.scheduler.has_work:
                break
            self.schedule()
            self._end_tick()
            self.check()
        assert not self.scheduler.has_work
        assert not self.live
        assert not self.held, "the worker is empty"

    def _end_tick(self) -> None:
        """The oldest tick is executed and answered; or the worker dies in it."""
        if self.flights[0].result is None:
            self.execute()
        if self.flights:
            self.answer()
