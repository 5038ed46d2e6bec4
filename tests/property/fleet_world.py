"""The world in which a fleet is tested: workers that hold programs, die of some, come back, come and go."""

from __future__ import annotations

import dataclasses
from collections import deque

from steploom.config import EngineConfig
from steploom.errors import QueueFull, RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest, Event, Failed, Finished, Restarted
from steploom.sched import Fleet, Member, build_scheduler

MAX_WAITING = 12


@dataclasses.dataclass
class Asked:
    """A request: ``kills``, if given, is the step in which its worker dies."""

    priority: int
    steps: int
    kills: int | None
    run: str | None = None  # while it is resident
    restarts: int = 0


@dataclasses.dataclass
class Worker:
    """Programs by run id, with the steps that they have done; and ticks that were sent and not executed."""

    member: Member
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    sent: deque[SchedulerOutput] = dataclasses.field(default_factory=deque)
    owed: set[str] = dataclasses.field(default_factory=set)  # it must be told to forget these


class FleetWorld:
    """Requests of one shape, so that any may join any. A worker dies only of requests that kill, if ``fair``."""

    def __init__(self, workers: int, max_batch: int, spare: int, policy: str, max_retries: int) -> None:
        self.now = 0.0
        self.config = EngineConfig(
            max_batch=max_batch, max_resident=max_batch + spare, max_waiting=MAX_WAITING, policy=policy,
            priority_ageing_s=1e9, max_retries=max_retries,
        )  # fmt: skip
        self.fleet = Fleet(self.config, self._scheduler())
        self.workers = [Worker(self.fleet.members[0])]
        self.live: dict[str, Asked] = {}
        self.sent: set[str] = set()
        self.deaths = 0
        self.by_chance = False
        for _ in range(workers - 1):
            self.add_worker()

    def _scheduler(self) -> object:
        return build_scheduler(self.config, lambda: self.now)

    def add_worker(self) -> None:
        self.workers.append(Worker(self.fleet.add(self._scheduler())))

    def submit(self, name: str, asked: Asked) -> None:
        steps = {"num_inference_steps": asked.steps}
        request = DiffusionRequest(name, seed=1, request_id=name, priority=asked.priority, **steps)
        waiting = sum(one.run is None for one in self.live.values())
        assert waiting == self.fleet.num_waiting
        if name in self.live:
            return
        try:
            assert self.fleet.add_request(request).position == waiting
        except QueueFull:
            assert waiting >= MAX_WAITING
        else:
            assert waiting < MAX_WAITING, "the bound is that of all workers together"
            self.live[name] = asked

    def abort(self, name: str) -> None:
        events = self.fleet.finish_requests([name, "unknown"], RequestCancelled("enough"))
        assert [event.request_id for event in events] == ([name] if name in self.live else [])
        asked = self.live.pop(name, None)
        if asked is not None and asked.run is not None:
            next(worker for worker in self.workers if asked.run in self._runs(worker)).owed.add(asked.run)

    def _runs(self, worker: Worker) -> set[str]:
        return worker.held.keys() | {run for output in worker.sent for run in output.run_ids}

    def schedule(self, worker: Worker) -> None:
        """Decides a tick of the worker, and checks it against what is known of all."""
        member = worker.member
        assert member.up
        lets_in = member.open  # A tick that ends a trial lets in others from the next one on.
        output = member.schedule()
        assert output.worker == self.workers.index(worker)
        assert set(output.finished_req_ids) == worker.owed, "a worker is told to forget exactly what it holds"
        worker.owed.clear()
        joined = [new.run_id for new in output.scheduled_new_reqs]
        assert not self.sent.intersection(joined), "run ids are never used twice, by whatever worker"
        self.sent.update(joined)
        for run in joined:
            self.live[request_id_of(run)].run = run
        assert len(output.run_ids) <= self.config.batch_limit
        assert not (joined and member.leaving and not member.scheduler.tries)
        if lets_in:
            self._check_shared(member, joined)
        worker.sent.append(output)

    def _check_shared(self, member: Member, joined: list[str]) -> None:
        """Nobody waits elsewhere who could be let in here, or should have been let in before those who were."""
        room = self.config.batch_limit - member.scheduler.num_running  # else it may be in a batch of another key
        for other in self.fleet.members:
            first = other.share.first()
            if other is member or first is None:
                continue
            if room > 0 and not len(member.share):
                assert other.open, "who waits with a worker that lets nobody in is taken over"
                assert len(other) < len(member) + 2, "and who waits with one that has more to do"
            if not other.scheduler.room[0]:
                worst = max((self.live[request_id_of(run)].priority for run in joined), default=-99)
                assert first[1].request.priority >= worst, "a better class waits where there is no place"

    def execute(self, worker: Worker) -> None:
        """The oldest tick of the worker is executed and answered; or the worker dies in it."""
        output = worker.sent.popleft()
        for run in output.finished_req_ids:
            worker.held.pop(run, None)
        for new in output.scheduled_new_reqs:
            worker.held[new.run_id] = 0
        assert len(worker.held) <= self.config.resident_limit
        here = [run for run in output.run_ids if run in worker.held]
        if any((asked := self._asked(run)) is not None and asked.kills == worker.held[run] for run in here):
            worker.sent.appendleft(output)
            self.die(worker)
            return
        reports = [self._step(worker, run, len(here)) for run in here]
        for event in worker.member.update_from_output(output, RunnerOutput(tick=output.tick, reports=reports)):
            self._take(event)

    def _asked(self, run: str) -> Asked | None:
        asked = self.live.get(request_id_of(run))
        return asked if asked is not None and asked.run == run else None

    def _step(self, worker: Worker, run: str, mates: int) -> RequestReport:
        worker.held[run] += 1
        asked, done = self._asked(run), worker.held[run]
        report = RequestReport(run_id=run, stepped=True, step=done, batch_key="key", batch_requests=mates, rows=1)
        if asked is None:
            return report
        report.total_steps = asked.steps
        if done == asked.steps:
            del worker.held[run]
            report.finished, report.output = True, f"image of {run}"
        return report

    def _take(self, event: Event) -> None:
        if isinstance(event, Finished):
            assert event.output.output == f"image of {self.live.pop(event.request_id).run}"
        elif isinstance(event, Failed):
            assert self.live.pop(event.request_id).kills is not None or self.by_chance, "it has done nothing"
        elif isinstance(event, Restarted):
            asked = self.live[event.request_id]
            asked.restarts += 1
            asked.run = None
            assert event.attempt == asked.restarts

    def die(self, worker: Worker) -> None:
        self.deaths += 1
        worker.held.clear()
        worker.sent.clear()
        worker.owed.clear()
        for event in worker.member.die("killed"):
            self._take(event)
        if any(one.open for one in self.fleet.members):
            assert worker.member.share.first() is None, "others have at once who may run elsewhere"

    def leave(self, at_once: bool) -> None:
        """The last worker lets nobody in, ends what it has, or others do it anew; then it is gone."""
        worker = self.workers[-1]
        worker.member.leave()
        assert worker.member.share.first() is None
        while worker.member.up and not at_once and worker.member.has_work:
            self.schedule(worker)
            self.execute(worker)
        for event in worker.member.recall():
            self._take(event)
        self.fleet.dismiss()
        self.workers.pop()

    def check(self) -> None:
        waiting = sum(one.run is None for one in self.live.values())
        assert (self.fleet.num_waiting, self.fleet.num_running) == (waiting, len(self.live) - waiting)
        for worker in self.workers:
            running = {request_id_of(run) for run in self._runs(worker) if self._asked(run) is not None}
            assert worker.member.scheduler.num_running == len(running), "it lives where it was admitted"

    def drain(self) -> None:
        """Without further arrivals everything ends."""
        killers = sum(one.kills is not None for one in self.live.values())
        rounds = 1 + killers * (self.config.max_retries + 2 * len(self.live).bit_length() + 2)
        for _ in range(60 * rounds):
            for worker in self.workers:
                if not worker.member.up:
                    worker.member.revive()
                while worker.sent:
                    self.execute(worker)
                if worker.member.up and worker.member.has_work:
                    self.schedule(worker)
            self.check()
            if not self.live and not any(worker.sent or worker.owed for worker in self.workers):
                break
        assert not self.live, "nobody is forgotten"
        assert not any(worker.member.has_work for worker in self.workers)
        assert not any(worker.held for worker in self.workers)
