"""Deadline: the earliest deadline that can still be kept goes first."""

from __future__ import annotations

from steploom.sched.lines import Rank
from steploom.sched.ranked import PREEMPT_GAIN, Ranked
from steploom.sched.state import RequestState


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
        return (now + self.demands.remaining_s(state, group_s) > state.deadline, state.deadline)

    def lost(self, state: RequestState, now: float, group_s: float) -> bool:
        """Whether the resident ``state`` is too late."""
        return self.urgency(state, now, group_s)[0] > 0

    def spares(self, victim: RequestState, other: RequestState, now: float, group_s: float) -> bool:
        """Whether ``victim`` is done in time though it waits for all of ``other``, which is not without it."""
        wait_s = PREEMPT_GAIN * self.demands.steps(other) * group_s
        own_s = self.demands.remaining_s(victim, group_s)
        return now + wait_s + own_s < victim.deadline and not self.late(other, now)
