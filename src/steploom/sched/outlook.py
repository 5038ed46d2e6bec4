"""Outlook: how long a request that has just come waits at least."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from steploom.config import EngineConfig
from steploom.sched.cost_model import CostModel
from steploom.sched.groups import Group, Groups
from steploom.sched.lines import Order
from steploom.sched.state import RequestState


class Runs(Protocol):
    """What is asked of a policy."""

    config: EngineConfig
    costs: CostModel
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
        requests, seconds, least_s = ahead(waiting, state, self._order, now)
        if requests < free:
            return 0.0
        done_s = self._done_s(groups, now)
        return min(done_s, least_s) + seconds * (1 - free / max(1.0, requests)) / max(self._policy.costs.gain, 1e-3)

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


def ahead(waiting: Iterable[RequestState], state: RequestState, order: Order, now: float) -> Ahead:
    """What of those that wait goes before ``state``, at least.

    These are better classes; of its class those of its own user that the policy ranks before it and that are not late;
    and of every other user as much as comes before its turn by deficit round robin, if the turns are fine.
    """
    requests = seconds = own = 0.0
    least_s = math.inf
    others: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    mine, user = (order.rank(state), state.arrival), state.request.user or ""
    for other in waiting:
        cost = order.charge(other)
        least_s = min(least_s, cost)
        if other.priority == state.priority and (other.request.user or "") != user:
            share = others[other.request.user or ""]
            share[0] += 1
            share[1] += cost
        elif other.priority < state.priority or _before(other, mine, order, now, other.priority == state.priority):
            requests, seconds = requests + 1, seconds + cost
            own += cost if other.priority == state.priority else 0.0
    turn = (own + order.charge(state)) / order.weights.get(user, 1.0)
    for name, (count, total) in others.items():
        part = min(1.0, turn * order.weights.get(name, 1.0) / total) if total > 0 else 0.0
        requests, seconds = requests + part * count, seconds + part * total
    return Ahead(requests, seconds, least_s)


def _before(other: RequestState, mine: tuple[object, int], order: Order, now: float, same_class: bool) -> bool:
    return same_class and (order.rank(other), other.arrival) < mine and not order.late(other, now)
