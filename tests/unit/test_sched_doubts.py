"""Estimates are made anew some at a time, in order of arrival, and no news makes a tick look at everybody."""

from __future__ import annotations

from typing import Any

import pytest
from test_sched_bounded import counted, states
from test_sched_policies import Costly

from steploom.errors import RequestCancelled
from steploom.sched.demand import Demands
from steploom.sched.doubts import LOOKS, Doubts, Row
from steploom.sched.intake import EACH_S, SOME, Intake


class State:
    """What is asked of one here."""

    def __init__(self, number: int) -> None:
        self.number, self.sure, self.request_id = number, False, f"r{number}"


def filled(count: int, kinds: int = 1) -> tuple[Any, list[Any]]:
    doubts, some = Doubts(), [State(number) for number in range(count)]
    for one in some:
        doubts.add(one, (f"?{one.number % kinds}", True))  # type: ignore[arg-type]
    return doubts, some


def taken(doubts: Any, some: list[Any], most: int) -> list[int]:
    alive = {one.request_id: one for one in some if one is not None}
    return [one.number for one in doubts.take(most, alive.get)]


def test_everybody_is_gone_over_once_for_any_news_and_what_was_begun_is_gone_on_with() -> None:
    doubts, some = filled(10)
    assert not doubts
    doubts.again((), everybody=True)
    assert taken(doubts, some, 4) == [0, 1, 2, 3]
    doubts.again((), everybody=True)
    assert taken(doubts, some, 4) == [4, 5, 6, 7], "not those again that were first: nobody else had a turn"
    assert taken(doubts, some, 8) == [8, 9, 0, 1, 2, 3]
    assert not doubts
    doubts.again((), everybody=True)
    assert taken(doubts, some, 2) == [0, 1]


def test_of_a_kind_only_its_own_are_gone_over_and_none_that_is_sure_or_gone() -> None:
    doubts, some = filled(9, kinds=3)
    some[4].sure = True
    doubts.again([("?1", True), ("?none", True)], everybody=False)
    assert taken(doubts, some, 9) == [1, 7]
    some[1] = None
    doubts.again([("?1", True)], everybody=False)
    doubts.drop(("?1", True))
    assert taken(doubts, some, 9) == [7], "the last time"
    doubts.again([("?1", True)], everybody=False)
    assert not doubts


def test_many_that_are_gone_are_not_all_looked_at_in_one_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    doubts, some = filled(1000)
    looks, step = 0, Row.step

    def counting(row: Row) -> Any:
        nonlocal looks
        looks += 1
        return step(row)

    monkeypatch.setattr(Row, "step", counting)
    doubts.again((), everybody=True)
    assert taken(doubts, [], 8) == []
    assert looks == 8 * LOOKS
    assert len(some) == 1000


def test_what_is_kept_of_those_that_are_gone_is_bounded_also_in_the_midst() -> None:
    doubts, some = filled(300)
    doubts.again((), everybody=True)
    assert taken(doubts, some, 10) == list(range(10))
    for number in range(10, 300):
        some[number] = None
    for number in range(300, 2000):
        doubts.add(State(number), ("?0", True))
    some.append(State(2000))
    for _ in range(200):
        doubts.add(some[-1], ("?0", True))
    assert len(doubts._all._states) < 700
    found = []
    while doubts:
        found += taken(doubts, some, 10)
    assert not set(found) - {*range(10), 2000}


@pytest.mark.parametrize(("seconds", "ticks"), [(1e-6, SOME), (SOME / EACH_S / 4, 4), (60.0, 1)])
def test_so_many_ticks_estimate_some_anew_that_it_takes_a_small_share_of_their_time(
    seconds: float, ticks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Costly(max_batch=1, max_resident=1, max_waiting=4000)
    h.cost = {512: seconds}
    h.add(*(f"r{n}" for n in range(300)), steps=40)
    estimates = counted(monkeypatch, Intake, "_estimate")
    h.tick()
    assert estimates() == SOME, "at once"
    for _ in range(3):
        made = [(h.tick(), estimates())[1] for _ in range(ticks)]
        assert made == [0] * (ticks - 1) + [SOME]


def test_of_many_sizes_no_tick_sorts_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    h = Costly(max_batch=2, max_resident=2, max_waiting=4000)
    h.cost = {64 + 8 * number: 0.01 for number in range(40)}
    for number in range(800):
        h.add(f"r{number}", steps=3, height=64 + 8 * (number % 40))
    estimates = counted(monkeypatch, Intake, "_estimate")
    for _ in range(300):
        h.tick()
        assert estimates() <= SOME
    waiting = [state for state in states(h).values() if not state.resident]
    measured = {state.guess for state in states(h).values() if state.sure}
    assert measured
    assert h.scheduler._intake.queued_s == pytest.approx(sum(state.standalone_s for state in waiting))  # type: ignore[attr-defined]
    h.scheduler.finish_requests(list(states(h)), RequestCancelled("enough"))


def test_the_nearest_kind_is_found_once_for_each_kind_until_another_is_known() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.learn(512, 1024)
    demands: Demands = h.scheduler.policy.demands
    h.cost |= {768: 2.0, 704: 1.8}
    h.add("a", height=768)
    h.add("b", height=704)
    state = states(h)["b"]
    before = demands.standalone_s(state)
    assert demands._nearest
    while "a" in states(h):
        h.tick()
    assert demands.standalone_s(state) != before, "768 is nearer"
