"""Deadline: the earliest deadline that can still be kept goes first."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from steploom.sched.groups import Group
from steploom.sched.lines import Rank
from steploom.sched.ranked import PREEMPT_GAIN, Ranked
from steploom.sched.state import RequestState

LAST: Rank = (True, math.inf)
"""Too late, and due last."""

ROUNDED_S = 1e-3
"""More than what seconds are rounded by where they are added up in another order."""


class Deadline(Ranked):
    """The earliest deadline that can still be kept goes first; requests without one are due after 5 times standalone.

    Who cannot be done in time any more goes behind those that can, the one that came first before the others. Every
    sixteenth place of a user is for the one that has waited longest, late or not, and a group that is passed over has a
    share of the time; so the hopeless do not starve.
    """

    def rank(self, state: RequestState) -> Rank:
        """By deadline."""
        return (state.deadline,)

    def late(self, state: RequestState, now: float) -> bool:
        """Whether it is too late, if the request began now and ran by itself."""
        return now + state.standalone_s > state.deadline

    def urgency(self, state: RequestState, now: float, group_s: float) -> Rank:
        """By deadline; those that are too late come last."""
        due = state.deadline
        return (now > due or now + self.demands.remaining_s(state, group_s) > due, due)

    def _foremost(self, groups: Sequence[Group], now: float) -> Group | None:
        """As :meth:`Ranked._foremost`. Of those that are due later than the best that was found nothing is asked."""
        if len(groups) <= 1:
            return groups[0] if groups else None
        best, found = LAST, groups[0]
        for due, number in sorted([(self._due_first(group, now), number) for number, group in enumerate(groups)]):
            if not best[0] and due >= best[1]:
                break
            group = groups[number]
            urgency = self._earliest(self._by_deadline(group, now), now, self._tick_s(group))
            if urgency < best:
                best, found = urgency, group
        return found

    def _due_first(self, group: Group, now: float) -> float:
        """The first deadline of its residents, and of who is the next one of those that wait for their places."""
        due, line = (group.order or self._ordered(group))[0].deadline, group.line
        if line.waiting and (first_due := line.first(now).deadline) < due:
            return first_due
        return due

    def _earliest(self, states: Sequence[RequestState], now: float, seconds: float) -> Rank:
        """The first deadline that can still be kept, of states in that order, else the first one."""
        best = LAST
        for state in states:
            urgency = self.urgency(state, now, seconds)
            best = min(best, urgency)
            if not urgency[0]:
                break
        return best

    def _by_deadline(self, group: Group, now: float) -> list[RequestState]:
        """Its residents, and who is the next one of those that wait for their places."""
        order = group.order or self._ordered(group)
        if not group.line.waiting:
            return order
        states = order.copy()
        insort(states, group.line.first(now), key=attrgetter("deadline"))
        return states

    def _ordered(self, group: Group) -> list[RequestState]:
        group.order = sorted(group.steps, key=attrgetter("deadline"))
        return group.order

    def lost(self, state: RequestState, now: float, group_s: float) -> bool:
        """Whether the resident ``state`` is too late."""
        return self.urgency(state, now, group_s)[0] > 0

    def lost_from(self, state: RequestState, group_s: float) -> float:
        """Before it is too late even if no step of it were done meanwhile."""
        return state.deadline - self.demands.most_left_s(state, group_s) - ROUNDED_S

    def _lost(self, group: Group, first: RequestState, now: float, seconds: float) -> set[RequestState]:
        """As :meth:`Ranked._lost`; none either if ``first`` will be late in this group, and all are due before it."""
        if self.urgency(first, now, seconds)[0] and self._due_last(group) <= first.deadline:
            return set()
        return super()._lost(group, first, now, seconds)

    def _due_last(self, group: Group) -> float:
        """The last deadline of its residents."""
        return (group.order or self._ordered(group))[-1].deadline

    def spares(self, victim: RequestState, other: RequestState, now: float, group_s: float) -> bool:
        """Whether ``victim`` is done in time though it waits for all of ``other``, which is not without it."""
        wait_s = PREEMPT_GAIN * self.demands.steps(other) * group_s
        own_s = self.demands.remaining_s(victim, group_s)
        return now + wait_s + own_s < victim.deadline and not self.late(other, now)
