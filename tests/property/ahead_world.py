"""An engine that runs ahead and its worker, with a wire between them on which messages take their time.

Scheduler, flights, inbox and agenda are the real ones; engine and runner are as simple as can be.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from steploom.config import EngineConfig
from steploom.engine.flights import Flights
from steploom.errors import QueueFull, RequestCancelled
from steploom.protocol import PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest, Failed, Finished, Restarted
from steploom.sched import Ranked, SchedulerInterface, build_scheduler
from steploom.sched.base_scheduler import BaseScheduler
from steploom.worker.agenda import Agenda
from steploom.worker.gaps import Gaps
from steploom.worker.messages import Amend, Command, Tick, Ticked
from steploom.worker.serving import Begun, Forget, Inbox, Obedience


@dataclasses.dataclass
class Course:
    """What a request does: ticks of encoding, steps, and ticks after its last step.

    ``aside``: it encodes and decodes beside the ticks.
    """

    encode: int
    steps: int
    tail: int
    tells: bool = True
    shape: int = 0
    aside: bool = False

    @property
    def ticks(self) -> int:
        return self.encode + self.steps + self.tail


class CountingRunner:
    """Counts the ticks of programs; checks what a worker is promised."""

    info = PipelineInfo(pipeline_class="Counting")

    def __init__(self, courses: dict[str, Course], max_batch: int, limit: int) -> None:
        self.courses = courses
        self.max_batch, self.limit = max_batch, limit
        self.done: dict[str, int] = {}
        self.begun: list[str] = []
        self.gone: set[str] = set()
        self.told_aside: set[str] = set()

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        for run in output.finished_req_ids:
            self.done.pop(run, None)
            self.gone.add(run)
        for new in output.scheduled_new_reqs:
            assert new.run_id not in self.begun, "a program starts once"
            assert new.run_id not in self.gone, "and not after it was forgotten"
            self.begun.append(new.run_id)
            self.done[new.run_id] = 0
        assert len(self.done) <= self.limit, "a worker never holds more than the limit"
        members = output.run_ids
        known = {run for run in members if run in self.told_aside}
        assert len(set(members)) == len(members)
        assert len(members) - len(known) <= self.max_batch, "who is aside takes no place in a batch"
        here = [run for run in members if run in self.done]
        if members:
            here += [run for run in self.done if self._is_aside(run) and run not in members]
        return RunnerOutput(tick=output.tick, reports=[self._advance(run) for run in here])

    def _is_aside(self, run: str) -> bool:
        course, done = self.courses[request_id_of(run)], self.done[run]
        return course.aside and (0 < done < course.encode or course.encode + course.steps <= done < course.ticks)

    def _advance(self, run: str) -> RequestReport:
        course = self.courses[request_id_of(run)]
        self.done[run] += 1
        done = self.done[run]
        step = min(max(0, done - course.encode), course.steps)
        stepped = course.encode < done <= course.encode + course.steps
        finished = done == course.ticks
        aside = self._is_aside(run)
        self.told_aside.update([run] if aside else [])
        if finished:
            del self.done[run]
        return RequestReport(
            run_id=run, aside=aside, stepped=stepped, step=step,
            total_steps=course.steps if course.tells and step else None,
            batch_key=f"key{course.shape}" if step else None, finished=finished, output="image" if finished else None,
        )  # fmt: skip

    def call(self, method: str, args: object, kwargs: object) -> object:
        return method

    def close(self) -> None:
        pass


def check_plans(scheduler: SchedulerInterface, runner: CountingRunner, flights: Flights) -> None:
    """Each resident is planned for, or in its last step in a tick in flight, or without a place, or aside."""
    assert isinstance(scheduler, BaseScheduler)
    policy = scheduler.policy
    assert isinstance(policy, Ranked)
    planned = {run for group in policy._groups.active.values() for run in group.residents}
    ending, outside = scheduler._ending.keys(), scheduler._outside.keys()
    aside = scheduler._aside.keys()
    assert len(planned) + len(ending) + len(outside) + len(aside) == len(scheduler._resident)
    assert planned | ending | outside | aside == scheduler._resident.keys()
    assert ending <= {run for output in scheduler._flights for run in output.run_ids}
    assert not outside & runner.done.keys() or len(flights), "what the worker holds is planned for"


class AheadWorld:
    """Both sides, moved by hand."""

    def __init__(self, scheduler: str, max_batch: int, spare: int, policy: str = "deadline") -> None:
        config = EngineConfig(
            scheduler=scheduler,
            max_batch=max_batch,
            max_resident=max_batch + spare,
            max_waiting=8,
            max_retries=1,
            policy=policy,
        )
        self.scheduler = build_scheduler(config, lambda: 0.0)
        assert self.scheduler.runs_ahead
        self.courses: dict[str, Course] = {}
        self.outcomes: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.flights = Flights(2)
        self.wire: deque[Command] = deque()
        self.answers: deque[Ticked] = deque()
        agenda = Agenda(config.resident_limit)
        self.inbox = Inbox(agenda)
        self.runner = CountingRunner(self.courses, max_batch if scheduler == "step" else 1, config.resident_limit)
        self.obedience = Obedience(self.runner, agenda, Gaps())
        self.executed: list[RunnerOutput] = []

    def submit(self, course: Course) -> None:
        name = f"r{len(self.courses)}"
        request = DiffusionRequest(
            name, seed=1, request_id=name, height=64 * course.shape, num_inference_steps=course.steps
        )
        try:
            self.scheduler.add_request(request)
        except QueueFull:
            return
        self.courses[name] = course

    @property
    def alive(self) -> list[str]:
        return [name for name in self.courses if name not in self.outcomes]

    def abort(self, name: str) -> None:
        (event,) = self.scheduler.finish_requests([name], RequestCancelled("enough"))
        self._end(name, "aborted")
        assert isinstance(event, Failed)

    def _end(self, name: str, how: str) -> None:
        assert name not in self.outcomes, "one outcome each"
        self.outcomes[name] = how

    @property
    def can_send(self) -> bool:
        return self.scheduler.has_work and len(self.flights) < 2

    def send(self) -> None:
        output = self.scheduler.schedule()
        assert output.run_ids or output.finished_req_ids, "no tick without anything to do"
        self.flights.depart(output)
        self.wire.append(Tick(output))

    def amend(self) -> None:
        """What the engine does after every arrival and every end from outside."""
        if len(self.flights) < 2:
            return
        amendment = self.scheduler.amend()
        if amendment is not None:
            assert amendment.run_ids or amendment.finished_req_ids
            self.flights._flights[-1].amendments.append(amendment)
            self.wire.append(Amend(amendment))

    def deliver(self) -> None:
        self.inbox.put(self.wire.popleft())

    def work(self) -> None:
        command = self.inbox.next()
        assert isinstance(command, Begun | Forget)
        answer = self.obedience.obey(command)
        if answer is not None:
            assert isinstance(answer, Ticked)
            assert answer.error is None, answer.error
            assert answer.output is not None
            self.answers.append(answer)
            self.executed.append(answer.output)

    def answer(self) -> None:
        answer = self.answers.popleft()
        flight = next(flight for flight in self.flights._flights if flight.result is None)
        assert flight.output.tick == answer.tick
        flight.result = answer.output
        for output, result, _, _ in self.flights.land():
            for event in self.scheduler.update_from_output(output, result):
                assert not isinstance(event, Restarted | Failed), "nothing is lost"
                if isinstance(event, Finished):
                    self._end(event.request_id, "finished")
                    assert event.output.timings.steps == self.courses[event.request_id].steps
            check_plans(self.scheduler, self.runner, self.flights)

    def turn(self) -> None:
        """Both sides do all that they can, the engine one tick ahead, and the wire takes no time."""
        while self.can_send:
            self.send()
            self.amend()
        while self.wire:
            self.deliver()
        if not self.inbox.empty:
            self.work()
        while self.answers:
            self.answer()

    def drain(self) -> None:
        """Without arrivals everything ends, in as many ticks as are needed."""
        while self.wire:
            self.deliver()
        budget = 8 + 2 * sum(3 + self.courses[name].ticks for name in self.alive)
        for _ in range(budget):
            if not (self.scheduler.has_work or self.flights or self.wire or not self.inbox.empty):
                break
            self.turn()
        assert not self.alive
        assert not self.scheduler.has_work
        assert not self.runner.done, "the worker is empty"
        assert not self.scheduler.num_running
        assert not self.scheduler.num_waiting
