"""Who is too late for its place is found without asking all residents in every tick, and nobody is missed."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from test_sched_policies import Costly

from steploom.config import EngineConfig
from steploom.errors import RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput
from steploom.requests import DiffusionRequest
from steploom.sched import build_scheduler
from steploom.sched.deadline import Deadline
from steploom.sched.groups import Group
from steploom.sched.ranked import Ranked
from steploom.sched.state import RequestState
from steploom.sched.watch import Watch


class Asking(Deadline):
    """Asks every resident in every tick."""

    def _preempt(self, group: Group, cached: list[str], now: float) -> list[RequestState]:
        if not self._room.in_memory(group, now):
            return []
        first, seconds = group.line.first(now), self._tick_s(group)
        if not (steps := [group.residents[run] for run in cached if run not in self._paused_before]):
            return []
        victim = max(steps, key=lambda state: (state.priority, self.urgency(state, now, seconds)))
        if not self._before(first, victim, now, seconds):
            return []
        group.paused[victim.run_id] = victim
        group.touch()
        self._paused_before.add(victim.run_id)
        return [self._groups.admit(group, now)]


class Run:
    """A scheduler whose answers are by chance, but the same for the same seed and decisions."""

    def __init__(self, policy: type[Ranked], seed: int, preempt: bool) -> None:
        self.chance, self.now, self.count, self.paused = random.Random(seed), 0.0, 0, 0
        config = EngineConfig(max_batch=4, max_waiting=10_000, policy=policy, preempt=preempt)
        self.scheduler: Any = build_scheduler(config, lambda: self.now)
        self.left: dict[str, int] = {}
        self.step_s = 0.02

    def arrive(self) -> None:
        chance = self.chance
        steps, name = chance.choice([1, 4, 10, 30]), f"r{self.count}"
        size, own = 64 * chance.choice([1, 1, 1, 2]), {"user": chance.choice(["ann", "bob"])}
        deadline = chance.choice([None, steps * chance.uniform(0.02, 0.3)])
        self.count += 1
        self.left[name] = steps
        given = {"height": size, "width": size, "num_inference_steps": steps, **own}
        priority = chance.choice([0, 0, 0, 1])
        self.scheduler.add_request(
            DiffusionRequest(request_id=name, seed=1, deadline=deadline, priority=priority, **given)
        )

    def tick(self) -> tuple[list[str], list[str]]:
        chance = self.chance
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            self.arrive()
        if chance.random() < 0.03:
            self.scheduler.finish_requests([f"r{chance.randrange(self.count + 1)}"], RequestCancelled("left"))
        if chance.random() < 0.02:
            self.step_s = chance.choice([0.01, 0.02, 0.05])
        output = self.scheduler.schedule()
        reports = [self.report(run, len(output.run_ids)) for run in output.run_ids]
        ended = sum(report.finished for report in reports)
        chores = 0.02 * ended * chance.random()
        seconds = self.step_s * (0.5 + 0.25 * len(reports)) + chores
        self.now += seconds * chance.uniform(0.8, 1.3)
        self.scheduler.update_from_output(
            output, RunnerOutput(tick=output.tick, reports=reports, seconds=seconds, chores_s=chores)
        )
        self.paused = max(self.paused, len(self.scheduler.policy._paused_before))
        return output.run_ids, [new.run_id for new in output.scheduled_new_reqs]

    def report(self, run: str, mates: int) -> RequestReport:
        name = run.partition("#")[0]
        self.left[name] -= 1
        height = self.scheduler._alive[name].request.params["height"]
        return RequestReport(
            run_id=run, phase="denoise", stepped=True, step=1, total_steps=None, batch_key=f"t{height}",
            batch_requests=mates, rows=2, finished=self.left[name] == 0,
        )  # fmt: skip


@pytest.mark.parametrize("preempt", [False, True])
def test_decisions_are_those_of_one_that_asks_every_resident_in_every_tick(preempt: bool) -> None:
    paused = Counter[int]()
    for seed in range(8):
        one, other = Run(Deadline, seed, preempt), Run(Asking, seed, preempt)
        for _ in range(300):
            assert one.tick() == other.tick()
        paused[seed] = one.paused
    assert paused.total() > 8


def test_residents_that_have_time_are_not_asked_in_every_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(max_batch=8)
    h.cost = {512: 0.01}
    h.add(*(f"r{number}" for number in range(200)), steps=200)
    for _ in range(40):
        h.tick()
    asked, urgency = 0, Deadline.urgency

    def counting(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        return urgency(*args)

    monkeypatch.setattr(Deadline, "urgency", counting)
    for _ in range(40):
        assert len(h.tick()[0]) == 8
    assert asked <= 40, "at most whether who comes next will be late"


def test_of_a_policy_that_says_only_who_is_lost_all_are_asked() -> None:
    class Own(Ranked):
        rank = Deadline.rank
        urgency = Deadline.urgency
        late = Deadline.late
        lost = Deadline.lost

    ranked = [Own, Deadline]
    found = []
    for policy in ranked:
        h = Costly(policy=policy, max_batch=1)
        h.learn(512)
        h.add("hopeless", steps=9, deadline=12.0)
        h.tick()
        h.now += 6
        h.add("waits", steps=2, deadline=30.0)
        found.append([h.tick()[0] for _ in range(4)])
    assert found[0] == found[1]
    assert found[0][0] == ["waits"]


class SimpleRun:
    def __init__(self, run_id: str) -> None:
        self.run_id = run_id


class Judge:
    """Who has ``left`` steps to do until ``due`` is lost; notes whom it was asked about."""

    def __init__(self) -> None:
        self.left, self.due = {"a": 10, "b": 10}, {"a": 100.0, "b": 200.0}
        self.asked: list[str] = []

    def lost(self, state: Any, now: float, group_s: float) -> bool:
        self.asked.append(state.run_id)
        return now + self.left[state.run_id] * group_s > self.due[state.run_id]

    def lost_from(self, state: Any, group_s: float) -> float:
        return self.due[state.run_id] - self.left[state.run_id] * group_s


def test_a_resident_is_asked_when_its_time_has_come_or_more_is_known() -> None:
    judge, watch = Judge(), Watch()
    residents: Any = {run: SimpleRun(run) for run in "ab"}

    def lost(now: float, seconds: float = 1.0, version: int = 1) -> list[str]:
        judge.asked.clear()
        return sorted(state.run_id for state in watch.lost(judge, residents, now, seconds, version))

    assert (lost(0.0), judge.asked) == ([], [])
    judge.left["a"] = 5
    assert (lost(91.0), judge.asked) == ([], ["a"]), "it has done five steps since"
    assert (lost(92.0), judge.asked) == ([], [])
    assert (lost(96.0), judge.asked) == (["a"], ["a"])
    judge.due["b"] = 50.0
    assert lost(92.0) == []
    watch.look(residents["b"])
    assert lost(92.0) == ["b"]
    judge.due = {"a": 100.0, "b": 200.0}
    assert lost(92.0) == []
    assert lost(92.0, seconds=11.0) == ["a", "b"], "longer ticks"
    watch.leave("b")
    del residents["b"]
    assert lost(92.0) == []
    judge.due["a"] = 50.0
    assert lost(40.0) == []
    assert lost(92.0, version=2) == ["a"], "something is known anew"
