"""Outlook: how long a request that has just come waits at least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from steploom.config import EngineConfig
from steploom.sched.demand import Demands
from steploom.sched.groups import Group, Groups
from steploom.sched.lines import Order
from steploom.sched.state import RequestState
from steploom.sched.survey import Survey

LARGE = 256
"""Where so many wait, they are not all looked at for each request that comes."""

SURVEYS = 64
"""Of so many groups at most it is kept what was found."""


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
        self._surveys: dict[str, Survey] = {}

    def forget(self) -> None:
        """What is known of those that wait has changed."""
        self._surveys.clear()

    def wait_s(self, state: RequestState, now: float) -> float:
        """Seconds until ``state`` has its turn among those that wait, and finds a place and room in its batch."""
        policy, groups = self._policy, self._groups
        demands, batch = policy.demands, policy.config.batch_limit
        gain = max(demands.costs.gain, demands.gain(state, batch), 1e-3)
        everybody = (other for one in groups.all() for other in one.line.states())
        survey = self._survey("", groups.waiting, everybody, now, gain)
        wait_s = self._behind(survey, groups.waiting, state, self._free, groups.active.values(), now, gain)
        group = groups.led(state.guess)
        if group is not None:
            count, room = len(group.line), max(0, batch - group.stepping)
            if count < groups.waiting:  # else it is all of them
                survey = self._survey(group.key, count, group.line.states(), now, gain)
            wait_s = max(wait_s, self._behind(survey, count, state, room, [group], now, gain))
        return wait_s

    def _survey(self, key: str, count: int, waiting: Iterable[RequestState], now: float, gain: float) -> Survey:
        """What was found of so many that wait: lately, if they are many and most of them are still the same."""
        kept = self._surveys.get(key)
        if kept is not None and count >= LARGE and kept.holds(count, now, gain):
            return kept
        survey = Survey(waiting, self._order, now, gain)
        if len(self._surveys) >= SURVEYS:
            self._surveys.clear()
        if count >= LARGE:
            self._surveys[key] = survey
        return survey

    def _behind(
        self, survey: Survey, count: int, state: RequestState, free: int, groups: Iterable[Group], now: float,
        gain: float,
    ) -> float:  # fmt: skip
        """Seconds until those that wait, so many by now, have left one of so many places for ``state``."""
        requests, seconds = survey.ahead(state)
        if requests < free:
            return 0.0
        first_s = 0.0  # One that has come since may be shorter than all of these.
        if not (self._policy.config.preempt or survey.changed(count)):
            first_s = min(self._done_s(groups, now), survey.least_s)
        return first_s + seconds * (1 - free / max(1.0, requests)) / gain

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
