"""Srpt: shortest remaining processing time first."""

from __future__ import annotations

from steploom.sched.lines import Rank
from steploom.sched.ranked import PREEMPT_GAIN, Ranked
from steploom.sched.state import RequestState


class Srpt(Ranked):
    """Who has the least left to do goes first: the best mean latency, at the cost of those that ask for much.

    L. Schrage, "A Proof of the Optimality of the Shortest Remaining Processing Time Discipline", Operations Research
    16, 1968. Every sixteenth place of a user is for the one that has waited longest.
    """

    def rank(self, state: RequestState) -> Rank:
        """By seconds of work."""
        return (state.standalone_s,)

    def urgency(self, state: RequestState, now: float, group_s: float) -> Rank:
        """By the seconds that are left."""
        return (self.demands.remaining_s(state, group_s),)

    def spares(self, victim: RequestState, other: RequestState, now: float, group_s: float) -> bool:
        """Whether ``victim`` has twice as much left to do."""
        return self.demands.left(victim) > PREEMPT_GAIN * self.demands.steps(other)
