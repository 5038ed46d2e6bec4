"""Users: whoever floods the queue, with one shape or with many, delays others by a bounded amount."""

from __future__ import annotations

from typing import Any

import pytest
from test_sched_policies import Costly, every_policy

from steploom.errors import RequestCancelled


def states(h: Costly) -> dict[str, Any]:
    return h.scheduler._alive  # type: ignore[attr-defined]


def until_done(h: Costly, name: str, most: int) -> int:
    """Ticks until it is done."""
    before, alive = h.ticks, states(h)
    while name in alive:
        h.tick()
        assert h.ticks - before <= most
    return h.ticks - before


def test_a_request_that_was_dear_does_not_make_the_turns_of_users_longer_for_ever() -> None:
    h = Costly(max_batch=1, max_resident=1, max_waiting=2000)
    h.learn(512)
    h.add("now", steps=3)
    h.tick()
    h.add("dear", steps=100, user="ann", deadline=1e5)
    for number in range(600):
        h.add(f"a{number}", steps=1, user="ann", deadline=1e6)
        h.add(f"b{number}", steps=1, user="bob", deadline=1e6)
    while h.scheduler.has_work:
        h.tick()
    order = list(h.joined)
    last = [name[0] for name in order[order.index("dear") + 420 :]][:150]
    assert last.count("a") == pytest.approx(75, abs=5)
    assert "aaa" not in "".join(last)
    assert "bbb" not in "".join(last)


@every_policy
@pytest.mark.parametrize("ageing_s", [20.0, 1e6], ids=["aged", "young"])
def test_a_flood_of_shapes_delays_another_user_s_shape_by_a_turn(policy: str, ageing_s: float) -> None:
    h = Costly(policy=policy, max_batch=4, max_resident=8, priority_ageing_s=ageing_s)
    sizes = [512 + 8 * number for number in range(150)]
    h.cost = dict.fromkeys([*sizes, 64], 1.0)
    for number, size in enumerate(sizes):
        h.add(f"ann{number}", steps=4, height=size, user="ann")
    for _ in range(50):
        h.tick()
    h.add("bob", steps=4, height=64, user="bob", deadline=1e6)
    before, alive = h.ticks, states(h)
    while "bob" in alive:
        h.tick()
    assert h.ticks - before <= 100, "ten requests of four steps each, time-sliced; not all of them"
    h.drain()
    assert len(h.joined) == 151, "and nobody starves"


def test_weights_hold_between_shapes_too() -> None:
    h = Costly(max_batch=1, max_resident=1, user_weights={"ann": 3.0}, priority_ageing_s=1e6)
    sizes = [512 + 8 * number for number in range(80)]
    h.cost = dict.fromkeys([*sizes, 64], 1.0)
    h.add("learn", steps=2, height=64)
    h.drain()
    for number, size in enumerate(sizes):
        h.add(f"{'ann' if number % 2 else 'bob'}{number}", steps=2, height=size, user="ann" if number % 2 else "bob")
    first = h.run()[1:41]
    assert 25 <= sum(name.startswith("ann") for name in first) <= 35
    assert "aaaaa" not in "".join(name[0] for name in first), "in turns all the while"


@every_policy
@pytest.mark.parametrize("places", [2, 4, 8])
def test_who_waits_behind_an_active_shape_has_its_turn_for_a_place(policy: str, places: int) -> None:
    h = Costly(policy=policy, max_batch=places, max_resident=places, max_waiting=5000)
    sizes = [512 + 8 * number for number in range(100)]
    h.cost = dict.fromkeys([*sizes, 64], 0.25)
    h.add("learn", steps=2, height=64)
    h.drain()
    h.add("carl", steps=400, height=64, user="carl")
    h.tick()
    for number, size in enumerate(sizes):
        h.add(f"ann{number}", steps=2, height=size, user="ann", deadline=1e6)
    for _ in range(20):
        h.tick()
    h.add("bob", steps=4, height=64, user="bob")
    until_done(h, "bob", 200)


def test_where_there_are_places_for_all_nobody_is_held_back_for_another_user() -> None:
    h = Costly(policy="fcfs", max_batch=2, max_resident=5)
    h.learn(512, 768)
    h.add("ann0", steps=1, user="ann")
    h.add("ann1", "ann2", steps=20, user="ann")
    assert h.tick()[0] == ["ann0", "ann1"]
    h.add("bob", steps=20, height=768, user="bob")
    assert h.tick()[0] == ["ann1", "ann2"], "there is room; that ann has had more matters where places are few"
    assert h.tick()[0] == ["bob"]


def test_a_shape_that_runs_leaves_a_place_to_a_user_that_has_had_less() -> None:
    h = Costly(policy="fcfs", max_batch=4, max_resident=4)
    h.learn(512, 768)
    h.add("a0", "a1", steps=1, user="ann")
    h.add("a2", "a3", "a4", "a5", "a6", steps=20, user="ann")
    assert h.tick()[0] == ["a0", "a1", "a2", "a3"]
    h.add("bob", steps=20, height=768, user="bob")
    assert h.tick()[0] == ["a2", "a3"], "there are two places, and ann has had more"
    assert h.tick()[0] == ["bob"]
    assert h.tick()[0] == ["a2", "a3", "a4"]


@every_policy
def test_who_waits_where_the_last_resident_has_ended_has_its_turn(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, max_waiting=5000)
    sizes = [520 + 8 * number for number in range(100)]
    h.cost = dict.fromkeys([*sizes, 64], 1.0)
    h.add("carl", steps=4, height=64, user="carl")
    h.tick()
    h.add("ann", steps=2, height=64, user="ann", deadline=10.0)
    h.add("bob", steps=2, height=64, user="bob", deadline=1e6)
    for number, size in enumerate(sizes):
        h.add(f"ann{number}", steps=2, height=size, user="ann", deadline=1e5)
    until_done(h, "bob", 20)


@every_policy
def test_new_measurements_do_not_give_the_turn_back(policy: str) -> None:
    h = Costly(policy=policy, max_batch=1, max_resident=1, max_waiting=5000)
    sizes = [520 + 8 * number for number in range(100)]
    h.cost = dict.fromkeys([*sizes, 64], 1.0)
    h.add("learn", steps=5, height=64)
    h.drain()
    for number, size in enumerate(sizes):
        h.add(f"ann{number}a", f"ann{number}b", steps=1, height=size, user="ann", deadline=1e5)
    h.add("bob", steps=1, height=64, user="bob", deadline=1e6)
    until_done(h, "bob", 10)


def test_those_that_come_and_go_behind_one_that_waits_leave_nothing() -> None:
    h = Costly(max_batch=1, max_resident=1)
    h.add("now", steps=5)
    h.tick()
    h.add("waits", height=768)
    for number in range(3000):
        h.add(f"r{number}", height=768, user=f"u{number}")
        h.scheduler.finish_requests([f"r{number}"], RequestCancelled("enough"))
    assert len(h.scheduler.policy._groups._hall) < 100  # type: ignore[attr-defined]
    assert len(h.scheduler.policy._groups.ledger.accounts) == 1  # type: ignore[attr-defined]
