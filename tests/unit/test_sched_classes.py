"""Classes of priority across shapes, users with odd weights, and batches that are added to while one runs."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from test_sched_costs import tick
from test_sched_policies import Costly, every_policy

from steploom.errors import RequestCancelled
from steploom.sched.cost_model import CostModel
from steploom.sched.curve import Curve


@every_policy
def test_who_waits_for_a_full_batch_lends_its_class_to_it(policy: str) -> None:
    """Else those of a class in between, in another shape, would overtake it for as long as they come."""
    h = Costly(policy=policy, max_batch=2, max_resident=4)
    h.learn(512, 768)
    h.add("low1", "low2", steps=20, priority=5)
    h.tick()
    for number in range(40):
        h.add(f"middle{number}", steps=2, height=768, priority=1)
    h.tick()
    h.add("high", steps=1, priority=0)
    before, alive = h.ticks, h.scheduler._alive  # type: ignore[attr-defined]
    while "high" in alive:
        h.tick()
    assert h.ticks - before <= 24


@every_policy
def test_a_better_class_joins_a_worse_one_s_batch_at_once(policy: str) -> None:
    h = Costly(policy=policy, max_batch=8, max_resident=16)
    h.learn(512, 768)
    h.add("low", steps=50, priority=5)
    h.tick()
    for number in range(40):
        h.add(f"middle{number}", steps=2, height=768, priority=1)
    h.tick()
    h.add("high", steps=1, priority=0)
    assert "high" in h.tick()[0]


def test_places_are_not_kept_for_a_crowd_of_a_worse_class() -> None:
    h = Costly(policy="fcfs", max_batch=8, max_resident=8)
    h.learn(512, 768)
    h.add(*(f"crowd{number}" for number in range(100)), steps=4, priority=5)
    h.tick()
    high = [f"high{number}" for number in range(8)]
    h.add(*high, steps=4, height=768, priority=0)
    sizes = Counter(len(members) for members in (h.tick()[0] for _ in range(12)) if members[0] in high)
    assert max(sizes) == 8
    assert sizes.total() <= 6


@every_policy
def test_who_was_let_in_by_its_age_is_not_passed_over_in_its_place(policy: str) -> None:
    h = Costly(policy=policy, max_batch=2, max_resident=4, priority_ageing_s=60.0)
    h.learn(512, 768)
    h.add("low", steps=2, height=768, priority=3, deadline=1e6)
    alive = h.scheduler._alive  # type: ignore[attr-defined]
    for number in range(200):
        h.add(f"high{number}", steps=4, priority=0)
        h.tick()
        if "low" not in alive:
            break
    assert h.ticks < 120


def test_tiny_weights_take_no_time() -> None:
    h = Costly(max_batch=1, max_resident=1, user_weights={"ann": 1e-9, "bob": 1e-9})
    h.learn(512)
    h.add("a", "b", user="ann", deadline=1e6)
    h.add("c", "d", user="bob", deadline=1e6)
    began = time.process_time()
    h.drain()
    assert time.process_time() - began < 1.0
    assert set(h.joined) == {"a", "b", "c", "d"}


def test_who_was_paused_goes_on_before_anybody_is_added() -> None:
    h = Costly(policy="srpt", max_batch=2, max_resident=4, preempt=True)
    h.learn(512)
    h.add("long1", steps=60)
    h.add("long2", steps=50)
    h.tick()
    h.add("short", steps=5)
    assert sorted(h.tick()[0]) == ["long2", "short"], "long1 is paused"
    scheduler = h.scheduler
    output = scheduler.schedule()
    h.add("new", steps=40)
    scheduler.finish_requests(["short"], RequestCancelled("enough"))
    amendment = scheduler.amend()
    assert amendment is not None
    assert not amendment.scheduled_new_reqs
    assert [run.split("#")[0] for run in amendment.scheduled_cached_reqs] == ["long1"]
    h.answer(output.amended(amendment))


def test_a_tick_that_is_added_to_stays_within_the_knee() -> None:
    h = Costly(max_batch="auto", max_resident=64)
    for count in (1, 2, 4, 8, 16):
        for again in range(3):
            h.add(*(f"{again}-{count}x{number}" for number in range(count)), steps=4)
            h.drain()
    knee = h.scheduler.costs.knee("key512")  # type: ignore[attr-defined]
    assert knee is not None
    h.add(*(f"s{number}" for number in range(60)), steps=3)
    scheduler, sizes = h.scheduler, list[int]()
    ahead = scheduler.schedule()
    while scheduler.has_work or ahead.run_ids:
        later = scheduler.schedule()
        sizes.append(len(ahead.run_ids))
        h.answer(ahead)
        amendment = scheduler.amend()
        ahead = later if amendment is None else later.amended(amendment)
    assert max(sizes) <= knee


def test_one_hiccup_changes_neither_what_sharing_gains_nor_what_encoders_take() -> None:
    model = CostModel()
    for _ in range(400):
        tick(model, 4, 0.2)
    gain = model.gain
    for _ in range(8):  # one in eight is looked at
        tick(model, 4, 100.0)
        for _ in range(6):
            tick(model, 4, 0.2)
    assert model.gain > 0.8 * gain
    curve = Curve()
    for _ in range(50):
        curve.observe_chores(0.6, 1)
    curve.observe_chores(60.0, 0)
    assert curve.chores_s < 1.0


@pytest.mark.parametrize("samples", [{"4": []}, {"0": [1.0]}, {"4": [float("nan")]}, {"4": [-1.0]}])
def test_kept_costs_that_cannot_be_are_not_taken_over(samples: dict[str, list[float]]) -> None:
    model = CostModel()
    told = {"version": 1, "curves": {"key": {"seconds": samples, "chores": [0.0, 0.0]}}, "gain": [1.0, 1.0]}
    assert not model.restore(told)
    assert not model.shown()
