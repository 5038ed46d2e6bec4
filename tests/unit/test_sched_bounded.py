"""No single tick or abort takes long where many wait: what concerns all of them is done some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_sched_fleet import ask, fleet, tick
from test_sched_policies import Costly, every_policy

from steploom.errors import RequestCancelled
from steploom.sched.ascending import Ascending
from steploom.sched.curve import SURE
from steploom.sched.hall import SLACK, Hall
from steploom.sched.intake import SOME, Intake
from steploom.sched.lines import RISING, Line


def states(h: Costly) -> dict[str, Any]:
    return h.scheduler._alive  # type: ignore[attr-defined]


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], int]:
    """How often a method was called since this was asked last."""
    calls, method = 0, getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return method(*args, **kwargs)

    def since() -> int:
        nonlocal calls
        found, calls = calls, 0
        return found

    monkeypatch.setattr(owner, name, counting)
    return since


@every_policy
@pytest.mark.parametrize("own", [{}, {"deadline": 600.0}], ids=["implicit", "deadline"])
def test_to_estimate_all_anew_takes_no_longer_for_each_where_more_wait(
    policy: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has not changed adds nothing: else each further one would sift through all of them."""
    sifted = 0
    keep = Ascending.keep

    def counting(self: Ascending[Any], which: Any) -> None:
        nonlocal sifted
        sifted += len(self)
        keep(self, which)

    monkeypatch.setattr(Ascending, "keep", counting)
    h = Costly(policy=policy, max_batch=4, max_resident=4, max_waiting=2000)
    h.add(*(f"r{n}" for n in range(1500)), steps=9, **own)
    for _ in range(SURE + 1):
        h.tick()
    assert sifted < 5 * 1500


@every_policy
def test_some_at_a_time_are_estimated_anew_the_oldest_first(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, max_waiting=4000)
    h.cost = {512: 3.0}
    h.add(*(f"r{n}" for n in range(5 * SOME)), steps=40)
    estimates = counted(monkeypatch, Intake, "_estimate")
    known = 0
    while known < 5 * SOME:
        h.tick()
        assert 0 < estimates() <= SOME
        found = [state.standalone_s == 120.0 for state in states(h).values()]
        assert found == sorted(found, reverse=True), "in order of arrival"
        assert sum(found) == min(known + SOME, 5 * SOME)
        known = sum(found)
        waiting = sum(state.standalone_s for state in states(h).values() if not state.resident)
        assert h.scheduler._intake.queued_s == pytest.approx(waiting)  # type: ignore[attr-defined]
    for _ in range(10):
        h.tick()
    assert estimates() <= 5 * SOME, "once more when it is sure"
    h.tick()
    assert estimates() == 0


def test_who_left_before_its_turn_is_not_estimated_anew_nor_held(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(max_batch=2, max_resident=2, max_waiting=4000)
    h.add(*(f"r{n}" for n in range(5 * SOME)), steps=9)
    estimates = counted(monkeypatch, Intake, "_estimate")
    h.tick()
    assert estimates() == SOME
    held = list(states(h).values())
    h.scheduler.finish_requests([f"r{n}" for n in range(2, 5 * SOME)], RequestCancelled("left"))
    h.tick()
    assert estimates() == 0
    assert not h.scheduler._intake._doubts  # type: ignore[attr-defined]
    assert len(held) == 5 * SOME


@every_policy
def test_some_at_a_time_rise_to_the_next_class_and_in_the_end_all(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, max_waiting=9000, priority_ageing_s=1000.0)
    h.learn(512)
    h.add("now", steps=30)
    h.tick()
    h.add(*(f"r{number}" for number in range(3 * RISING)), priority=3, steps=1)
    h.now += 1500
    h.add("better", *(f"b{number}" for number in range(9)), priority=1, steps=1)
    moved = counted(monkeypatch, Line, "_put")
    risen = 0
    while risen < 3 * RISING:
        h.tick()
        assert moved() <= RISING
        assert sum(state.priority == 1 for name, state in states(h).items() if name[0] == "r") >= risen
        risen = sum(state.priority == 1 for state in states(h).values() if state.request.priority == 3)
        risen += sum(name[0] == "r" for name in h.joined)


def test_with_several_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fleet(2, max_batch=1, max_resident=1, max_waiting=4000)
    ask(one, *(f"r{n}" for n in range(4 * SOME)), height=512, width=512)
    estimates = counted(monkeypatch, Intake, "_estimate")
    before = {run: waiter.seconds for member in one.members for run, waiter in member.share._waiting.items()}
    for _ in range(8):
        for member in one.members:
            tick(member)
            assert estimates() <= SOME
    after = {run: waiter.seconds for member in one.members for run, waiter in member.share._waiting.items()}
    assert len(after) > SOME
    assert not [run for run, seconds in after.items() if seconds == before[run]]


def test_an_abort_among_many_groups_gives_nobody_its_place_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(max_batch=1, max_resident=1, max_waiting=4000)
    h.add("now", steps=30)
    h.tick()
    for number in range(400):
        h.cost[64 + number] = 1.0
        h.add(f"o{number}", steps=1, height=64 + number)
    enters = counted(monkeypatch, Hall, "enter")
    hall = h.scheduler.policy._groups._hall  # type: ignore[attr-defined]
    for number in range(390):
        h.scheduler.finish_requests([f"o{number}"], RequestCancelled("left"))
        assert enters() <= 1
    for turn in range(300):  # Of each only the first is in the hall; the second one is entered when that is gone.
        h.add(*(f"p{turn}{which}" for which in "ab"), steps=1, height=100)
        h.scheduler.finish_requests([f"p{turn}{which}" for which in "ab"], RequestCancelled("left"))
        assert enters() <= 3
        assert 10 <= len(hall) <= 2 * 14 + SLACK
    h.scheduler.finish_requests(["now"], RequestCancelled("left"))
    h.drain()
    assert list(h.joined) == ["now", *(f"o{number}" for number in range(390, 400))]
