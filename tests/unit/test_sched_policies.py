"""What deadline and srpt decide, what stands above them, and what is refused: against a clock that is set by hand."""

from __future__ import annotations

from typing import Any

import pytest
from sched_harness import Harness

from steploom.errors import DeadlineExceeded, QueueFull
from steploom.protocol import RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import Event

every_policy = pytest.mark.parametrize("policy", ["deadline", "srpt", "fcfs"])


class Costly(Harness):
    """Ticks take seconds, and so many of the clock pass: ``cost[height]`` for each request, at least ``least_s``."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**{"policy": "deadline", **config})
        self.cost = {512: 1.0, 768: 2.0, 1024: 4.0}
        self.least_s = 0.0
        self.joined: dict[str, int] = {}
        self.ticks = 0

    def add(self, *names: str, steps: int = 2, height: Any = 512, **own: Any) -> None:
        super().add(*names, steps=steps, height=height, **{"width": height, "num_inference_steps": steps, **own})

    def answer(self, output: SchedulerOutput, /, *, without: tuple[str, ...] = (), **fields: Any) -> list[Event]:
        runs = output.run_ids
        for new in output.scheduled_new_reqs:
            self.joined[request_id_of(new.run_id)] = self.ticks
        self.ticks += 1
        seconds = max(self.least_s, sum(self.cost[self.heights[request_id_of(run)]] for run in runs))
        self.now += seconds
        reports = [self.report(run, rows=1, total_steps=self.steps[request_id_of(run)], **fields) for run in runs]
        result = RunnerOutput(tick=output.tick, reports=reports, seconds=seconds)
        return self.scheduler.update_from_output(output, result)

    def learn(self, *heights: int) -> None:
        """One request of each size by itself, of two steps."""
        for height in heights:
            self.add(f"learn{height}", height=height)
            self.drain()
        self.joined.clear()

    def run(self) -> list[str]:
        """Ticks until no work is left; the names in the order in which they joined."""
        self.drain()
        return sorted(self.joined, key=lambda name: self.joined[name])


def test_the_earliest_deadline_goes_first() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512)
    h.add("now", steps=3)
    h.tick()
    h.add("late", deadline=300)
    h.add("early", deadline=30)
    h.add("middle", deadline=100)
    assert h.run() == ["now", "early", "middle", "late"]


def test_who_cannot_be_done_in_time_goes_behind_who_can_and_is_done_all_the_same() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512)
    h.add("now", steps=3)
    h.tick()
    h.add("hopeless", steps=5, deadline=1)
    h.add("fine", steps=5, deadline=30)
    assert h.run() == ["now", "fine", "hopeless"]


def test_a_request_without_a_deadline_is_due_after_five_times_its_own_time() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512)
    h.add("long", steps=20)  # due in 100
    h.add("short", steps=2)  # due in 10
    assert h.run() == ["short", "long"]


def test_a_timeout_is_a_deadline_too() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512)
    h.add("now", steps=3)
    h.tick()
    h.add("short", steps=2)  # due in 10
    h.add("strict", steps=3, timeout=6)
    assert h.run() == ["now", "strict", "short"]


def test_the_hopeless_never_starve() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512)
    h.add("hopeless", steps=2, deadline=0.1)
    for number in range(60):
        h.add(f"fine{number}", steps=1, deadline=1000)
        h.tick()
        h.add(f"more{number}", steps=1, deadline=1000)
        if "hopeless" in h.joined:
            break
    assert h.joined["hopeless"] < 40


def test_srpt_lets_the_shortest_go_first() -> None:
    h = Costly(policy="srpt", max_batch=1, max_resident=1)
    h.learn(512, 1024)
    h.add("now", steps=3)
    h.tick()
    h.add("large", steps=3, height=1024)
    h.add("long", steps=10)
    h.add("short", steps=1)
    assert h.run() == ["now", "short", "long", "large"]


@every_policy
def test_a_lower_class_goes_before_whatever_the_policy_says(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1)
    h.learn(512)
    h.add("now", steps=3)
    h.tick()
    h.add("second", steps=1, priority=1, deadline=9)
    h.add("first", steps=50, priority=0, deadline=5000)
    assert h.run() == ["now", "first", "second"]


@every_policy
def test_who_has_waited_for_long_rises_to_the_next_class(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, priority_ageing_s=50.0)
    h.learn(512)
    h.add("low", steps=1, priority=3, deadline=10)
    for number in range(100):
        h.add(f"high{number}", steps=2, priority=0)
        h.tick()
        h.tick()
    assert 20 < h.joined["low"] < 150


@every_policy
def test_a_request_of_another_shape_joins_at_once_if_there_is_a_place(policy: str) -> None:
    h = Costly(policy=policy, max_batch=4)
    h.learn(512, 1024)
    h.add("a", "b", steps=100)
    h.tick()
    h.add("large", steps=4, height=1024)
    h.tick()
    if policy == "fcfs":  # which has the shapes take turns
        h.tick()
    assert "large" in h.joined


@every_policy
def test_a_lower_class_goes_before_another_shape(policy: str) -> None:
    h = Costly(policy=policy, max_batch=4, max_resident=8, priority_ageing_s=1e6)
    h.learn(512, 1024)
    h.add("low", steps=20, height=1024, priority=1, deadline=25)
    h.tick()
    h.add("high", steps=10, priority=0, deadline=500)
    assert [h.tick()[0] for _ in range(10)] == [["high"]] * 10
    assert h.tick()[0] == ["low"]


@every_policy
def test_a_lower_shape_has_a_share_while_a_better_one_never_ends(policy: str) -> None:
    """With the only place taken each time by another request of the better class."""
    h = Costly(policy=policy, max_batch=1, max_resident=1, priority_ageing_s=60.0)
    h.learn(512, 1024)
    h.add("low", steps=1, height=1024, priority=1, deadline=25)
    for number in range(100):
        h.add(f"high{number}", steps=2, priority=0)
        h.tick()
        h.tick()
    assert 20 < h.joined["low"] < 150


@every_policy
def test_no_shape_starves_while_others_come_without_end(policy: str) -> None:
    h = Costly(policy=policy, max_batch=2, max_resident=4)
    h.learn(512, 1024)
    h.add("large", steps=3, height=1024, deadline=0.1)
    for number in range(400):
        h.add(f"small{number}", steps=2, deadline=1000)
        h.tick()
        if h.done.get("large#3", 0) or "large" not in h.scheduler._alive:
            return
    raise AssertionError("it starves")


@every_policy
def test_one_user_s_flood_does_not_delay_another_user_s_request(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1)
    h.learn(512)
    h.add(*(f"flood{number}" for number in range(200)), steps=2, user="ann")
    for _ in range(4):
        h.tick()
    h.add("single", steps=2, user="bob")
    before = h.ticks
    h.drain()
    assert h.joined["single"] - before <= 4


@every_policy
def test_users_share_seconds_not_requests_by_their_weights(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, user_weights={"ann": 3.0})
    h.learn(512)
    h.add(*(f"ann{number}" for number in range(100)), steps=2, user="ann", deadline=1e6)
    h.add(*(f"bob{number}" for number in range(100)), steps=4, user="bob", deadline=1e6)
    for _ in range(160):
        h.tick()
    ann, bob = (sum(h.steps[name] for name in h.joined if name.startswith(user)) for user in ("ann", "bob"))
    assert 2.3 < ann / bob < 3.7


@every_policy
def test_who_runs_is_paused_for_a_better_class_if_asked_for(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=4, preempt=True)
    h.learn(512)
    h.add("low", steps=10, priority=1, deadline=1000)
    h.tick()
    h.add("high", steps=2, priority=0, deadline=5000)
    assert [h.tick()[0] for _ in range(3)] == [["high"], ["high"], ["low"]]


def test_who_can_afford_it_is_paused_for_somebody_urgent_once() -> None:
    h = Costly(max_batch=1, max_resident=4, preempt=True)
    h.learn(512)
    h.add("patient", steps=10, deadline=1000)
    h.tick()
    h.add("urgent", steps=2, deadline=8)
    assert [h.tick()[0] for _ in range(3)] == [["urgent"], ["urgent"], ["patient"]]
    h.add("urgent2", steps=2, deadline=8)
    assert h.tick()[0] == ["patient"], "nobody is paused twice"


@pytest.mark.parametrize(("preempt", "deadline"), [(False, 1000), (True, 11)], ids=["not asked for", "would be late"])
def test_who_runs_is_not_paused(preempt: bool, deadline: float) -> None:
    h = Costly(max_batch=1, max_resident=4, preempt=preempt)
    h.learn(512)
    h.add("runs", steps=10, deadline=deadline)
    h.tick()
    h.add("urgent", steps=2, deadline=8)
    assert h.tick()[0] == ["runs"]


@every_policy
def test_with_auto_the_batch_ends_at_the_knee(policy: str) -> None:
    h = Costly(policy=policy, max_batch="auto")
    h.add(*(f"r{number}" for number in range(12)), steps=30)
    sizes = [len(h.tick()[0]) for _ in range(20)]
    assert max(sizes) == 4, "so many are tried before anybody can say"
    h.drain()
    h.add(*(f"s{number}" for number in range(12)), steps=3)
    assert len(h.tick()[0]) <= 2, "a row costs what it costs alone: sharing gains nothing"


def test_seconds_of_work_are_bounded_and_the_answer_says_when_to_come_again() -> None:
    h = Costly(max_batch=1, max_resident=1, max_waiting_s=25.0)
    h.learn(512)
    h.add("now", steps=5)
    h.tick()
    h.add("a", "b", steps=10)
    with pytest.raises(QueueFull, match=r"max_waiting_s=25.*try again later") as caught:
        h.add("c", steps=10)
    assert 1 <= (caught.value.retry_after_s or 0) <= 30
    h.drain()
    h.add("c", steps=10)


def test_a_full_queue_says_when_to_come_again() -> None:
    h = Costly(max_batch=1, max_resident=1, max_waiting=2)
    h.learn(512)
    h.add("now", steps=5)
    h.tick()
    h.add("a", "b", steps=10)
    with pytest.raises(QueueFull, match="max_waiting=2") as caught:
        h.add("c", steps=10)
    assert 1 <= (caught.value.retry_after_s or 0) <= 30


def test_a_timeout_that_cannot_be_kept_is_refused_at_once_if_asked_for() -> None:
    h = Costly(max_batch=1, max_resident=1, refuse_hopeless=True)
    h.add("first", steps=2, timeout=0.001)  # nobody knows yet
    h.drain()
    with pytest.raises(DeadlineExceeded, match="timeout=5: the request takes about 10 s even by itself"):
        h.add("alone", steps=10, timeout=5)
    h.add("now", steps=5)
    h.tick()
    h.add("a", steps=20)
    with pytest.raises(QueueFull, match="timeout=12: the request would wait for about 4 s, ") as caught:
        h.add("b", steps=10, timeout=12)
    assert caught.value.retry_after_s is not None
    h.add("c", steps=10, timeout=100)
    Costly(max_batch=1).add("any", steps=1000, timeout=0.001)
