"""Estimates from before anything was measured, and who is refused since it would be too late."""

from __future__ import annotations

from typing import Any

import pytest
from test_sched_costs import tick
from test_sched_policies import Costly, every_policy

from steploom.errors import QueueFull, RequestCancelled
from steploom.sched.cost_model import CostModel
from steploom.sched.curve import AGAIN, SAMPLES, SURE, Curve
from steploom.sched.intake import DUE


def states(h: Costly) -> dict[str, Any]:
    return h.scheduler._alive  # type: ignore[attr-defined]


def test_estimates_of_the_first_wave_are_made_anew_once_something_was_measured() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.add("first", "same", steps=4)
    h.add("other", steps=4, height=1024)
    h.add("asked", steps=4, deadline=7.0)
    guessed = {name: state.standalone_s for name, state in states(h).items()}
    assert guessed["same"] < 1.0
    h.tick()
    alive = states(h)
    assert [alive[name].standalone_s for name in ("first", "same", "asked")] == [4.0, 4.0, 4.0]
    assert alive["other"].standalone_s > 10 * guessed["other"], "by the nearest size"
    for name in ("first", "same", "other"):
        assert alive[name].deadline == alive[name].submitted + DUE * alive[name].standalone_s
    assert alive["asked"].deadline == alive["asked"].submitted + 7.0
    waiting = [state for state in alive.values() if not state.resident]
    assert h.scheduler._intake.queued_s == pytest.approx(sum(state.standalone_s for state in waiting))  # type: ignore[attr-defined]
    h.drain()
    assert h.scheduler._intake.queued_s == 0  # type: ignore[attr-defined]
    h.add("later", steps=4, height=1024)
    assert states(h)["later"].standalone_s == 16.0


def test_who_waits_has_another_place_once_it_is_known_what_it_takes() -> None:
    h = Costly(policy="srpt", max_batch=2, max_resident=2)
    h.cost = {512: 4.0, 1024: 1.0}
    h.add("small", steps=1)
    h.add("large", steps=1, height=1024)
    h.add("small2", "small3", steps=3)  # 12 s, but it looks as if it were less than
    h.add("large2", "large3", steps=4, height=1024)  # 4 s
    h.drain()
    order = list(h.joined)
    assert order[-1] == "small3"
    assert order.index("large3") < order.index("small3"), "it is known by now that"


@every_policy
def test_one_that_waits_again_after_a_death_is_estimated_anew_too(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1)
    h.add("a", "b", "c", steps=3)
    h.scheduler.schedule()
    h.scheduler.restart()
    h.tick()
    assert {state.standalone_s for state in states(h).values()} == {3.0}
    h.drain()
    assert set(h.joined) == {"a", "b", "c"}


def test_one_s_own_deadline_has_its_place_among_those_that_are_estimated_anew() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.add("now", steps=4)
    h.add("in between", steps=4)  # it seems to be due at once, and is in 20 s
    h.add("before", steps=4, deadline=15)
    h.add("after", steps=4, deadline=60)
    assert h.run() == ["now", "before", "in between", "after"]


class Refusing(Costly):
    """Whose requests are refused if they cannot be done within their timeouts; one runs for 10 s more."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**{"max_batch": 1, "max_resident": 1, "refuse_hopeless": True, **config})
        self.learn(512)
        self.add("now", steps=11)
        self.tick()


def test_what_is_behind_a_request_does_not_make_it_hopeless() -> None:
    h = Refusing()
    h.add(*(f"worse{number}" for number in range(50)), steps=10, priority=5, deadline=1e5)
    h.add("better class", steps=5, timeout=40.0)
    h.add(*(f"later{number}" for number in range(50)), steps=10, deadline=1e5)
    h.add("earlier deadline", steps=5, timeout=40.0)
    h.add(*(f"flood{number}" for number in range(50)), steps=1, user="ann", deadline=10.0)
    h.add("another user", steps=5, timeout=60.0, user="bob")
    with pytest.raises(QueueFull, match="would wait for about"):
        h.add("same user", steps=5, timeout=45.0, deadline=1e6, user="ann", priority=1)


def test_those_that_are_late_go_behind() -> None:
    h = Refusing()
    h.add(*(f"late{number}" for number in range(10)), steps=20, deadline=1.0)
    h.add("in time", steps=5, timeout=30.0)


def test_what_runs_counts() -> None:
    h = Refusing()
    with pytest.raises(
        QueueFull, match="timeout=8: the request would wait for about 10 s, and takes 2 s more"
    ) as caught:
        h.add("hurried", steps=2, timeout=8)
    assert caught.value.retry_after_s == pytest.approx(4.0)
    h.add("patient", steps=2, timeout=13)


def test_who_finds_a_place_does_not_wait() -> None:
    h = Refusing(policy="fcfs", max_batch=4, max_resident=8)
    h.add("one", "two", steps=10)
    h.add("third", steps=10, timeout=12)
    with pytest.raises(QueueFull):
        h.add("fourth", steps=10, timeout=12)


@every_policy
def test_a_knee_is_found_under_load(policy: str) -> None:
    """A start with a long queue tries few requests first: else nobody would ever know that fewer are as good."""
    h = Costly(policy=policy, max_batch="auto")
    h.least_s = 4.0
    h.add(*(f"r{number}" for number in range(60)), steps=12)
    for _ in range(200):
        h.tick()
    assert h.scheduler.costs.knee("key512") == 4  # type: ignore[attr-defined]
    h.drain()
    h.add(*(f"s{number}" for number in range(30)), steps=3)
    assert len(h.tick()[0]) == 4


@pytest.mark.parametrize("steps", [10**400, 2**63], ids=["huge", "large"])
def test_steps_without_measure_are_only_slow(steps: int) -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.add("now", steps=2)
    h.tick()
    h.add("huge", steps=3, num_inference_steps=steps)
    h.add("usual", steps=3)
    assert h.run() == ["now", "usual", "huge"]


def test_one_slow_tick_does_not_set_the_estimates_of_the_first_wave() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.cost = {512: 20.0}
    h.add("now", "waits", steps=10)
    h.tick()
    h.cost = {512: 1.0}
    for _ in range(3):
        h.tick()
    assert {state.standalone_s for state in states(h).values()} == {10.0}


@pytest.mark.parametrize("slow", [2, 4, 8])
def test_one_slow_tick_does_not_halve_the_knee(slow: int) -> None:
    h = Costly(max_batch="auto", max_waiting=5000)
    h.least_s, h.cost = 1.0, {512: 0.02}
    h.add(*(f"r{number}" for number in range(400)), steps=8)
    stumbled = False
    while h.scheduler.has_work:
        output = h.scheduler.schedule()
        h.least_s = 5.0 if len(output.run_ids) == slow and not stumbled else 1.0
        stumbled = stumbled or h.least_s > 1
        h.answer(output)
    assert stumbled
    knee = h.scheduler.costs.knee("key512")  # type: ignore[attr-defined]
    assert knee is None or knee > 30


def test_more_rows_than_the_knee_are_tried_again_now_and_then() -> None:
    curve = Curve()
    for rows, seconds in ((1, 1.0), (2, 1.0), (4, 4.0), (8, 8.0)):  # four were slow by chance
        for _ in range(SURE):
            curve.observe(rows, seconds)
    assert curve.knee == curve.cap == 2
    for _ in range(AGAIN + 1):
        curve.observe(2, 1.0)
    assert curve.cap == 4
    for rows in (4, 8, 16):
        for _ in range(8):
            curve.observe(rows, 1.0)
    assert curve.cap >= 16


def test_a_lower_bound_of_the_wait_refuses_nobody_who_could_be_done() -> None:
    """Those that turn late meanwhile go behind; a resident is paused; a burst shares what it has not shared so far."""
    h = Refusing(preempt=True, max_resident=2)
    h.add("urgent", steps=2, timeout=8)
    h = Costly(max_batch=8, refuse_hopeless=True)
    h.cost = {512: 0.001}
    h.least_s = 1.0
    for count in (1, 1, 1, 8):
        h.add(*(f"{len(h.joined)}w{number}" for number in range(count)), steps=4)
        h.drain()
    h.add(*(f"b{number}" for number in range(24)), steps=4, timeout=20.0)
    h.drain()
    assert sum(name.startswith("b") for name in h.joined) == 24


def test_kinds_of_which_nobody_is_alive_are_forgotten() -> None:
    h = Costly()
    for number in range(5000):
        h.add(f"r{number}", height=64 + number)
        h.scheduler.finish_requests([f"r{number}"], RequestCancelled("enough"))
    assert len(h.scheduler._intake._doubts) < 2100  # type: ignore[attr-defined]


def test_the_batch_key_that_is_measured_all_the_time_is_not_forgotten() -> None:
    model = CostModel()
    for number in range(3000):
        tick(model, 4, 0.2)
        tick(model, 4, 0.2, key=f"other:{number}#1")
    assert len(model.state()["curves"]["transformer:64"]["seconds"]["4"]) == SAMPLES


@every_policy
def test_those_of_a_guess_follow_to_its_key_in_their_order(policy: str) -> None:
    h = Costly(policy=policy, max_batch=2, max_resident=2)
    h.add(*(f"r{n}" for n in range(6)), steps=3)
    h.tick()
    (group,) = h.scheduler.policy._groups.all()  # type: ignore[attr-defined]
    assert group.batch_key is not None
    assert len(group.line) == 4
    h.add("r6", steps=3)
    h.scheduler.finish_requests(["r4"], RequestCancelled("left"))
    h.drain()
    assert list(h.joined) == ["r0", "r1", "r2", "r3", "r5", "r6"]


def test_residents_are_in_another_order_once_more_is_known_of_them() -> None:
    h = Costly(max_batch=2, max_resident=4)
    h.cost = {512: 0.01, 768: 0.01}
    h.add("guessed", steps=40)
    h.add("asked", steps=40, deadline=60.0)
    h.add("other", "another", steps=40, height=768)
    policy: Any = h.scheduler.policy  # type: ignore[attr-defined]

    def orders() -> list[list[str]]:
        found = [policy._by_deadline(group, h.now) for group in policy._groups.active.values()]
        assert all(states == sorted(states, key=lambda state: state.deadline) for states in found)
        return [[state.request_id for state in states] for states in found]

    output = h.scheduler.schedule()
    assert orders() == [["guessed", "asked"]]
    h.answer(output)
    assert orders() == [["guessed", "asked"]]
    h.cost = {512: 10.0, 768: 0.01}
    for _ in range(12):
        h.tick()
        found = orders()
    assert ["asked", "guessed"] in found
