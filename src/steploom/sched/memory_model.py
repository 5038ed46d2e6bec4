"""MemoryModel: whether there is memory for one more resident, from what was measured of others of its kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from steploom.sched.demand import Demands
from steploom.sched.groups import Group
from steploom.sched.state import RequestState

Members = tuple[Group | None, Collection[RequestState]]
"""Requests, and the group whose ticks they take part in; None if they take part in none."""


class MemoryModel:
    """Bounds the residents of a worker by bytes: what they keep, and the largest peak that a tick of theirs may have.

    A tick steps one group, so of the groups only the dearest tick counts. What nobody has measured counts as nothing,
    and there is no bound while nobody says how much memory there is.

    Args:
        share: Of the memory that there is, so much may be filled; None for no bound.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share

    def bounded(self, demands: Demands) -> bool:
        """Whether there is a bound by now, as ``demands`` know."""
        return self._share is not None and demands.costs.room_bytes > 0

    def holds(self, demands: Demands, members: Iterable[Members]) -> bool:
        """Whether there is memory for all of these at once, by what ``demands`` know of them."""
        if self._share is None or not self.bounded(demands):
            return True
        held = chores = 0.0
        steps: dict[str, float] = {}
        for group, states in members:
            need = demands.memory(states, None if group is None else group.batch_key)
            held += need.held
            chores = max(chores, need.chores)
            if group is not None:  # also those that are paused: they go on some time
                steps[group.key] = steps.get(group.key, 0.0) + need.step
        return held + max(chores, *steps.values(), 0.0) <= self._share * demands.costs.room_bytes
