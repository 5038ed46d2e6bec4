"""Whether a request is hopeless is found without a look at all that wait, and never too strictly."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_sched_bounded import counted, states
from test_sched_policies import Costly, every_policy

from steploom.errors import QueueFull, RequestCancelled
from steploom.requests import DiffusionRequest
from steploom.sched.books import RequestState
from steploom.sched.outlook import LARGE
from steploom.sched.survey import LASTS_S, SHARE, Survey

WAITING = 10_000


def crowded(policy: str, waiting: int, **own: Any) -> Costly:
    """Two run, one second a step, and so many wait."""
    h = Costly(policy=policy, max_batch=2, max_resident=2, max_waiting=2 * WAITING, refuse_hopeless=True)
    h.learn(512)
    h.add("now", "too", steps=900)
    h.tick()
    h.add(*(f"w{number}" for number in range(waiting)), steps=5, **own)
    return h


def newcomer(h: Costly, name: str, **own: Any) -> RequestState:
    """One that has come, and is not enqueued."""
    request = DiffusionRequest(name, seed=1, request_id=name, height=512, num_inference_steps=5, **own)
    state = RequestState(request, next(h.scheduler._numbers.arrivals), h.now, states(h)["w0"].guess, f"{name}#0")  # type: ignore[attr-defined]
    h.scheduler._intake._estimate(state)  # type: ignore[attr-defined]
    return state


def exact(h: Costly, state: RequestState) -> float:
    """What is found with nothing remembered; what is remembered stays."""
    outlook = h.scheduler.policy._outlook  # type: ignore[attr-defined]
    kept, outlook._surveys = outlook._surveys, {}
    found = outlook.wait_s(state, h.now)
    outlook._surveys = kept
    return found


@every_policy
@pytest.mark.parametrize("waiting", [1600, pytest.param(WAITING, marks=pytest.mark.slow)])
def test_all_are_looked_at_once_for_many_that_come(policy: str, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h = crowded(policy, waiting)
    looks = counted(monkeypatch, Survey, "__init__")
    for number in range(waiting // SHARE // 2):
        h.add(f"patient{number}", steps=5, timeout=1e6)
    assert looks() == 1
    for number in range(waiting // SHARE // 2 + 2):
        h.scheduler.finish_requests([f"w{number}"], RequestCancelled("enough"))
    h.add("after that", steps=5, timeout=1e6)
    assert looks() == 1
    h.now += LASTS_S + 0.1
    h.add("later", steps=5, timeout=1e6)
    h.add("and then", steps=5, timeout=1e6)
    assert looks() == 1


def test_those_that_are_refused_do_not_have_all_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    h = crowded("fcfs", 4 * LARGE)
    looks = counted(monkeypatch, Survey, "__init__")
    for number in range(8 * LARGE // SHARE):
        with pytest.raises(QueueFull, match="would wait for about"):
            h.add(f"hurried{number}", steps=5, timeout=60.0)
    assert looks() == 1


@every_policy
def test_what_is_remembered_is_a_lower_bound_and_not_much_lower(policy: str) -> None:
    """Whoever has come or left meanwhile, of whatever class and user."""
    h, dice = crowded(policy, 4 * LARGE, deadline=1e6), random.Random(3)
    alive, lower = [f"w{number}" for number in range(1, 4 * LARGE)], 0
    for number in range(300):
        who = {"priority": dice.choice((0, 0, 0, -1, 1)), "user": dice.choice((None, "ann", "bob"))}
        if dice.random() < 0.5:
            h.add(f"r{number}", steps=dice.choice((2, 5, 9)), deadline=dice.choice((1e5, 1e7)), **who)
            alive.append(f"r{number}")
        else:
            gone = alive.pop(dice.randrange(len(alive)))
            h.scheduler.finish_requests([gone], RequestCancelled("enough"))
        state = newcomer(h, f"new{number}", deadline=2e6, **who)
        found, least = exact(h, state), h.scheduler.policy.wait_s(state)  # type: ignore[attr-defined]
        assert found - 9 * (len(alive) + 1) / SHARE - 9 <= least <= found + 1e-6, "as many may have come or left"
        lower += least < found
    assert 0 < lower < 300


def test_new_estimates_count_at_once() -> None:
    h = crowded("fcfs", 2 * LARGE)
    state = newcomer(h, "new")
    policy: Any = h.scheduler.policy  # type: ignore[attr-defined]
    before_s, waiting = policy.wait_s(state), [one for one in states(h).values() if not one.resident]
    for one in waiting:
        one.standalone_s /= 2
    policy.revalue(waiting)
    assert policy.wait_s(state) == pytest.approx(before_s / 2, rel=0.1)


def test_no_request_is_kept() -> None:
    h = crowded("deadline", LARGE)
    h.add("patient", steps=5, timeout=1e6)
    (survey,) = h.scheduler.policy._outlook._surveys.values()  # type: ignore[attr-defined]
    seen, found = [survey], set[int]()
    while seen:
        one = seen.pop()
        assert not isinstance(one, RequestState)
        if id(one) not in found:
            found.add(id(one))
            seen += list(one.values()) if isinstance(one, dict) else list(one) if isinstance(one, list | tuple) else []
            seen += list(vars(one).values()) if hasattr(one, "__dict__") else []


def reckoned(h: Costly, state: RequestState, gain: float) -> tuple[float, float]:
    """As :meth:`Survey.ahead`, one request after the other."""
    order = h.scheduler.policy._order  # type: ignore[attr-defined]
    ledger, mine = order.ledger, (order.rank(state), state.arrival)
    requests = seconds = own_s = 0.0
    others: dict[str, list[float]] = {}
    waiting = [one for one in states(h).values() if not one.resident]
    for one in sorted(waiting, key=lambda one: (order.rank(one), one.arrival)):
        if one.priority < state.priority:
            requests, seconds = requests + 1, seconds + one.standalone_s
        elif one.priority == state.priority and one.user != state.user:
            others.setdefault(one.user, []).append(one.standalone_s)
        elif one.priority == state.priority and (order.rank(one), one.arrival) < mine:
            in_time = not order.late(one, h.now + own_s / gain)
            requests, own_s = requests + in_time, own_s + in_time * one.standalone_s
    turn = ledger[state.user] + (own_s + state.standalone_s) / ledger.weights.get(state.user, 1.0)
    for user, each in others.items():
        share = max(0.0, turn - ledger[user]) * ledger.weights.get(user, 1.0) / sum(each)
        requests, seconds = requests + min(1.0, share) * len(each), seconds + min(1.0, share) * sum(each)
    return requests, seconds + own_s


@every_policy
def test_it_is_what_goes_before_a_request(policy: str) -> None:
    h, dice = (
        Costly(policy=policy, max_batch=2, max_resident=2, user_weights={"ann": 3.0, "bob": 0.5}),
        random.Random(5),
    )
    h.learn(512)
    h.add("w0", "w1", steps=900)
    for number in range(2, 60):
        who = {"priority": dice.choice((0, 0, 1)), "user": dice.choice((None, "ann", "bob", f"u{number}"))}
        h.add(f"w{number}", steps=dice.choice((2, 5, 9)), deadline=dice.choice((9.0, 40.0, 900.0)), **who)
    for _ in range(12):
        h.steps[dice.choice([name for name in h.steps if name[0] == "w"])] = 1
        h.tick()
    order = h.scheduler.policy._order  # type: ignore[attr-defined]
    survey = Survey([one for one in states(h).values() if not one.resident], order, h.now, 1.5)
    for number, user in enumerate((None, "ann", "bob", "u7", "new") * 4):
        state = newcomer(h, f"n{number}", user=user, deadline=dice.choice((30.0, 2000.0)), priority=number % 3 - 1)
        assert survey.ahead(state) == pytest.approx(reckoned(h, state, 1.5), abs=1e-6)
    assert h.scheduler.num_waiting > 30
