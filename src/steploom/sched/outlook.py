"""Outlook: how long a request that has just come waits at least."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from steploom.config import EngineConfig
from steploom.sched.demand import Demands
from steploom.sched.groups import Group, Groups
from steploom.sched.lines import Order, Rank
from steploom.sched.state import RequestState


class Runs(Protocol):
    """What is asked of a policy."""

    config: EngineConfig
    demands: Demands
    aside: Mapping[str, RequestState]

    def done_s(self, state: RequestState, group: Group, now: float) -> float:
        """Seconds until a resident gives its place in a batch away."""
        ...


class Outlook:
    """How long requests wait: a lower bound, for who is refused on it is refused for good.

    Args:
        policy: Knows about residents.
        groups: All requests.
        order: Of those that wait.
    """

    def __init__(self, policy: Runs, groups: Groups, order: Order) -> None:
        self._policy = policy
        self._groups = groups
        self._order = order

    def wait_s(self, state: RequestState, now: float) -> float:
        """Seconds until ``state`` has its turn among those that wait, and finds a place and room in its batch."""
        policy, groups = self._policy, self._groups
        waiting = (other for one in groups.all() for other in one.line.states())
        wait_s = self._behind(waiting, state, self._free, groups.active.values(), now)
        group = groups.led(state.guess)
        if group is not None:
            room = max(0, policy.config.batch_limit - group.stepping)
            wait_s = max(wait_s, self._behind(group.line.states(), state, room, [group], now))
        return wait_s

    def _behind(
        self, waiting: Iterable[RequestState], state: RequestState, free: int, groups: Iterable[Group], now: float
    ) -> float:
        """Seconds until those that wait have left one of so many places for ``state``."""
        config, demands = self._policy.config, self._policy.demands
        gain = max(demands.costs.gain, demands.gain(state, config.batch_limit), 1e-3)
        requests, seconds, least_s = ahead(waiting, state, self._order, now, gain)
        if requests < free:
            return 0.0
        done_s = 0.0 if config.preempt else self._done_s(groups, now)
        return min(done_s, least_s) + seconds * (1 - free / max(1.0, requests)) / gain

    def place_s(self, now: float) -> float:
        """Seconds until the first resident is done, if all places are taken; else 0."""
        return 0.0 if self._free else self._done_s(self._groups.active.values(), now)

    @property
    def _free(self) -> int:
        """Places that nobody holds."""
        return max(0, self._policy.config.resident_limit - self._groups.taken - len(self._policy.aside))

    def _done_s(self, groups: Iterable[Group], now: float) -> float:
        done = [self._policy.done_s(state, group, now) for group in groups for state in group.residents.values()]
        return min(done, default=0.0)


class Ahead(NamedTuple):
    """What goes before a request.

    Attributes:
        requests: How many.
        seconds: What they would take one at a time.
        least_s: What the shortest of all that wait takes.
    """

    requests: float
    seconds: float
    least_s: float


def ahead(waiting: Iterable[RequestState], state: RequestState, order: Order, now: float, gain: float) -> Ahead:
    """What of those that wait goes before ``state``, at least.

    These are better classes; of its class those of its own user that the policy ranks before it and that are not late
    when their turn comes; and of every other user as much as it takes to have had as much.

    Args:
        waiting: All that wait.
        state: The one that has come.
        order: Of those.
        now: The clock's reading.
        gain: Seconds of work that are done in a second.
    """
    requests = seconds = 0.0
    least_s = math.inf
    own: list[tuple[Rank, int, RequestState]] = []
    others: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    mine, user = (order.rank(state), state.arrival), state.user
    for other in waiting:
        cost = other.standalone_s
        least_s = min(least_s, cost)
        if other.priority < state.priority:
            requests, seconds = requests + 1, seconds + cost
        elif other.priority == state.priority and other.user != user:
            share = others[other.user]
            share[0] += 1
            share[1] += cost
        elif other.priority == state.priority and (order.rank(other), other.arrival) < mine:
            own.append((order.rank(other), other.arrival, other))
    in_time, own_s = _in_time(own, order, now, gain)
    ledger = order.ledger
    turn = ledger[user] + (own_s + state.standalone_s) / ledger.weights.get(user, 1.0)
    for name, (count, total) in others.items():
        before = max(0.0, turn - ledger[name]) * ledger.weights.get(name, 1.0)
        part = min(1.0, before / total) if total > 0 else 0.0
        requests, seconds = requests + part * count, seconds + part * total
    return Ahead(requests + in_time, seconds + own_s, least_s)


def _in_time(own: list[tuple[Rank, int, RequestState]], order: Order, now: float, gain: float) -> tuple[int, float]:
    """How many of these are not late when those before them are done, and what they take."""
    count, seconds = 0, 0.0
    for _, _, state in sorted(own, key=lambda one: one[:2]):
        if not order.late(state, now + seconds / gain):
            count, seconds = count + 1, seconds + state.standalone_s
    return count, seconds
