"""The world in which a fleet is tested: workers that hold programs, die of some, come back, come and go.

Fleet, flights, inbox and agenda are the real ones; engine and runner are as simple as can be.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from ahead_world import CountingRunner, Course, check_plans

from steploom.config import EngineConfig
from steploom.engine.flights import Flights
from steploom.errors import QueueFull, RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest, Event, Failed, Finished, Restarted
from steploom.sched import Fleet, Member, build_scheduler
from steploom.worker.agenda import Agenda
from steploom.worker.gaps import Gaps
from steploom.worker.messages import Amend, Command, Tick, Ticked
from steploom.worker.serving import Begun, Forget, Inbox, Obedience

MAX_WAITING = 12


@dataclasses.dataclass
class Asked(Course):
    """A request: ``kills``, if given, is how many ticks it has done when its worker dies in the next one."""

    priority: int = 0
    kills: int | None = None
    run: str | None = None  # while it is resident
    home: Worker | None = None  # likewise
    restarts: int = 0


class Died(BaseException):
    """The worker's process is gone, in a tick with this run."""


class MortalRunner(CountingRunner):
    """Dies of requests that kill."""

    def _advance(self, run: str) -> RequestReport:
        course = self.courses[request_id_of(run)]
        assert isinstance(course, Asked)
        if course.kills == self.done[run]:
            raise Died(run)
        report = super()._advance(run)
        if report.batch_key is not None:
            report.rows = report.batch_requests = 1
        return report

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        result = super().execute(output)
        result.seconds = 0.1 + len(result.reports)  # so that what was guessed of requests turns out to be wrong
        return result


class Worker:
    """Its part in the fleet, the ticks that were sent to it, what is on its way to it, and its process."""

    def __init__(self, member: Member, config: EngineConfig, batch: int, courses: dict[str, Course]) -> None:
        self.member = member
        self._config, self._batch, self._courses = config, batch, courses
        self.spawn()

    def spawn(self) -> None:
        limit = self._config.resident_limit
        agenda = Agenda(limit)
        self.flights = Flights(2)
        self.wire: deque[Command] = deque()
        self.inbox = Inbox(agenda)
        self.runner = MortalRunner(self._courses, self._batch, limit)
        self.obedience = Obedience(self.runner, agenda, Gaps())

    def work(self, late: bool) -> bool:
        """Does what has arrived, up to the answer to one tick; whether there is one. ``late`` are amendments, if so."""
        while self.wire or not self.inbox.empty:
            while self.wire and not (late and isinstance(self.wire[0], Amend) and not self.inbox.empty):
                self.inbox.put(self.wire.popleft())
            command = self.inbox.next()
            assert isinstance(command, Begun | Forget)
            answer = self.obedience.obey(command)
            if answer is not None:
                assert isinstance(answer, Ticked)
                assert answer.error is None, answer.error
                next(flight for flight in self.flights._flights if flight.result is None).result = answer.output
                return True
        return False


class FleetWorld:
    """Moves everything by hand. Nobody else than who kills is to fail, unless a worker has died ``by_chance``."""

    def __init__(
        self, workers: int, max_batch: int, spare: int, policy: str, max_retries: int, scheduler: str = "step"
    ) -> None:
        self.now = 0.0
        self.config = EngineConfig(
            max_batch=max_batch, max_resident=max_batch + spare, max_waiting=MAX_WAITING, policy=policy,
            priority_ageing_s=1e9, max_retries=max_retries, scheduler=scheduler,
        )  # fmt: skip
        self.batch = max_batch if scheduler == "step" else 1
        self.courses: dict[str, Course] = {}
        self.live: dict[str, Asked] = {}
        self.joined: set[str] = set()
        self.by_chance = False
        self.mixed = False
        self.fleet = Fleet(self.config, self._scheduler())
        self.workers = [self._worker(self.fleet.members[0])]
        for _ in range(workers - 1):
            self.add_worker()

    def _scheduler(self) -> object:
        return build_scheduler(self.config, lambda: self.now)

    def _worker(self, member: Member) -> Worker:
        assert member.runs_ahead
        return Worker(member, self.config, self.batch, self.courses)

    def add_worker(self) -> None:
        self.workers.append(self._worker(self.fleet.add(self._scheduler())))

    def submit(self, asked: Asked) -> None:
        name = f"r{len(self.courses)}"
        request = DiffusionRequest(
            name, seed=1, request_id=name, priority=asked.priority, height=64 * asked.shape,
            num_inference_steps=asked.steps,
        )  # fmt: skip
        waiting = sum(one.run is None for one in self.live.values())
        assert waiting == self.fleet.num_waiting
        try:
            assert self.fleet.add_request(request).position == waiting
        except QueueFull:
            assert waiting >= MAX_WAITING
        else:
            assert waiting < MAX_WAITING, "the bound is that of all workers together"
            self.courses[name] = self.live[name] = asked
            self.mixed = self.mixed or asked.shape > 0

    def abort(self, name: str) -> None:
        (event,) = self.fleet.finish_requests([name, "unknown"], RequestCancelled("enough"))
        assert (type(event), event.request_id) == (Failed, name)
        del self.live[name]

    def can_send(self, worker: Worker) -> bool:
        return worker.member.up and worker.member.has_work and len(worker.flights) < 2

    def send(self, worker: Worker) -> None:
        """Decides a tick of the worker, and checks it against what is known of all."""
        lets_in = worker.member.open  # A tick that ends a trial lets in others from the next one on.
        output = worker.member.schedule()
        assert output.run_ids or output.finished_req_ids, "no tick without anything to do"
        worker.flights.depart(output)
        worker.wire.append(Tick(output))
        self._sent(worker, output, lets_in)

    def amend(self) -> None:
        """What the engine does, for each worker, after every arrival and every end from outside."""
        for worker in self.workers:
            if worker.member.up and len(worker.flights) == 2:
                lets_in = worker.member.open
                amendment = worker.member.amend()
                if amendment is not None:
                    assert amendment.run_ids or amendment.finished_req_ids
                    worker.flights._flights[-1].amendments.append(amendment)
                    worker.wire.append(Amend(amendment))
                    self._sent(worker, amendment, lets_in)

    def _sent(self, worker: Worker, output: SchedulerOutput, lets_in: bool) -> None:
        assert output.worker == self.workers.index(worker)
        joined = [new.run_id for new in output.scheduled_new_reqs]
        assert not self.joined.intersection(joined), "run ids are never used twice, by whatever worker"
        self.joined.update(joined)
        for run in joined:
            asked = self.live[request_id_of(run)]
            assert asked.home is None, "it lives where it was admitted"
            asked.run, asked.home = run, worker
        assert not (joined and worker.member.leaving and not worker.member.scheduler.tries)
        if lets_in:
            self._check_shared(worker.member, joined)

    def _check_shared(self, member: Member, joined: list[str]) -> None:
        """Nobody waits elsewhere who could be let in here, or should have been let in before those who were."""
        room = self.batch - member.scheduler.num_running  # else it may be in a batch of another key
        for other in self.fleet.members:
            first = other.share.first()
            if other is member or first is None:
                continue
            if room > 0 and not len(member.share):
                assert other.open, "who waits with a worker that lets nobody in is taken over"
                assert len(other) < len(member) + 2, "and who waits with one that has more to do"
            if not other.scheduler.room[0] and not self.mixed:
                worst = max((self.live[request_id_of(run)].priority for run in joined), default=-99)
                assert first[1].request.priority >= worst, "a better class waits where there is no place"

    def work(self, worker: Worker, late: bool = False) -> None:
        """The worker executes and answers a tick; or dies in it."""
        try:
            if not worker.work(late):
                return
        except Died as death:
            asked = self.live.get(request_id_of(str(death)))
            # Of one that was aborted nobody may know that it was there.
            self.die(worker, by_chance=asked is None or asked.run != str(death))
            return
        for output, result, _, _ in worker.flights.land():
            for event in worker.member.update_from_output(output, result):
                assert not isinstance(event, Restarted), "nothing is lost by a worker that lives"
                self._take(event)
            check_plans(worker.member.scheduler, worker.runner, worker.flights)

    def _take(self, event: Event) -> None:
        if isinstance(event, Finished):
            assert event.output.timings.steps == self.live.pop(event.request_id).steps
        elif isinstance(event, Failed):
            assert self.live.pop(event.request_id).kills is not None or self.by_chance, "it has done nothing"
        elif isinstance(event, Restarted):
            asked = self.live[event.request_id]
            asked.restarts += 1
            asked.run = asked.home = None
            assert event.attempt == asked.restarts

    def die(self, worker: Worker, *, by_chance: bool) -> None:
        self.by_chance = self.by_chance or by_chance
        worker.spawn()
        for event in worker.member.die("killed"):
            self._take(event)
        if any(one.open for one in self.fleet.members):
            assert worker.member.share.first() is None, "others have at once who may run elsewhere"

    def leave(self, at_once: bool) -> None:
        """The last worker lets nobody in, ends what it has, or others do it anew; then it is gone."""
        worker = self.workers[-1]
        worker.member.leave()
        assert worker.member.share.first() is None
        while worker.member.up and not at_once and (worker.member.has_work or len(worker.flights)):
            while self.can_send(worker):
                self.send(worker)
            self.work(worker)
        for event in worker.member.recall():
            self._take(event)
        self.fleet.dismiss()
        self.workers.pop()

    def check(self) -> None:
        waiting = sum(one.home is None for one in self.live.values())
        assert (self.fleet.num_waiting, self.fleet.num_running) == (waiting, len(self.live) - waiting)
        for worker in self.workers:
            running = {one.run for one in self.live.values() if one.home is worker}
            assert worker.member.scheduler.num_running == len(running), "it lives where it was admitted"
            waiting = [one.state for one in worker.member.share._waiting.values()]
            assert abs(worker.member.share.queued_s - sum(state.standalone_s for state in waiting)) < 1e-6
            others = {one.run for one in self.live.values() if one.home is not worker}
            assert not others & worker.runner.done.keys()

    def drain(self) -> None:
        """Without further arrivals everything ends."""
        killers = sum(one.kills is not None for one in self.live.values())
        rounds = 1 + killers * (self.config.max_retries + 2 * len(self.live).bit_length() + 2)
        for _ in range(2 * rounds * (8 + sum(3 + one.ticks for one in self.live.values()))):
            for worker in self.workers:
                if not worker.member.up:
                    worker.member.revive()
                while self.can_send(worker):
                    self.send(worker)
                self.amend()
                self.work(worker)
            self.check()
            if not any(len(one.flights) or one.wire or one.member.has_work for one in self.workers):
                break
        assert not self.live, "nobody is forgotten"
        for worker in self.workers:
            assert not worker.member.has_work
            assert worker.inbox.empty
            assert not worker.runner.done, "the worker is empty"
