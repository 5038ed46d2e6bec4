"""Room: whether one more fits into a batch, up to the knee of its cost, and into memory."""

from __future__ import annotations

import math
from itertools import accumulate

from steploom.sched.groups import Group, Groups
from steploom.sched.memory_model import Members, MemoryModel
from steploom.sched.policy import Policy
from steploom.sched.state import RequestState


class Room:
    """Whether requests find room, by the rows of their groups and by bytes.

    Args:
        policy: Knows what requests take, and who is aside.
        groups: All requests.

    Attributes:
        leaving: A group, and those of it whose last step is in the tick that is decided.
    """

    def __init__(self, policy: Policy, groups: Groups) -> None:
        self._policy = policy
        self._groups = groups
        self._knees = policy.config.max_batch == "auto"
        self._memory = MemoryModel(policy.config.memory_share)
        self.leaving: Members = (None, ())

    def for_one(self, group: Group, max_batch: int, free: int, now: float) -> bool:
        """Whether the next of those that wait in the group may join it."""
        return free > 0 and group.stepping < max_batch and self.for_next(group, now)

    def for_next(self, group: Group, now: float) -> bool:
        """Likewise, if it has a place."""
        costs = self._policy.costs
        bounded = (self._knees or costs.limited) and (group.stepping or self._leaving_rows(group))
        if bounded and not self.fits(group, group.line.first(now)):
            return False
        return costs.room_bytes <= 0 or self.in_memory(group, now)

    def for_all(self, free: int) -> bool:
        """Whether there are places for all that wait, of all groups, and bytes do not count."""
        return self._groups.waiting <= free and not self._memory.bounded(self._policy.demands)

    def in_memory(self, group: Group, now: float) -> bool:
        """Whether there is memory for the next of those that wait in the group, beside who has waited for too long.

        If nobody is resident there is: who is too large even alone is tried alone, and does not starve.
        """
        demands, groups = self._policy.demands, self._groups
        if not self._memory.bounded(demands):
            return True
        residents: list[Members] = [(one, one.residents.values()) for one in groups.active.values()]
        residents += [(None, self._policy.aside.values()), self.leaving]
        if not any(states for _, states in residents):
            return True
        waiting = dict.fromkeys(one for one in (group, groups.overtaken(now)) if one is not None)
        residents += [(one, [one.line.first(now)]) for one in waiting]
        return self._memory.holds(demands, residents)

    def fits(self, group: Group, state: RequestState) -> bool:
        """Whether the group with ``state`` has no more rows than the knee, or than memory was seen to allow."""
        costs = self._policy.costs
        if not (self._knees or costs.limited):
            return True
        cap = costs.cap(group.batch_key) if self._knees else math.inf
        rows = self.rows(group) + self._leaving_rows(group) + self._policy.demands.rows(state)
        return rows <= min(cap, costs.limit(group.batch_key))

    def over_knee(self, group: Group) -> bool:
        """Whether all residents of the group, with those that leave, have more rows than the knee."""
        if not self._knees:
            return False
        return self.rows(group) + self._leaving_rows(group) > self._policy.costs.cap(group.batch_key)

    def steps(self, group: Group, max_batch: int) -> list[str]:
        """The residents that step in a tick of the group, oldest first."""
        paused = group.paused
        runs = [run for run in group.residents if run not in paused] if paused else list(group.residents)
        limit = self._policy.costs.limit(group.batch_key) if self._policy.costs.limited else math.inf
        if limit < math.inf:
            max_batch = min(max_batch, self._within(group, runs, limit))
        return runs if len(runs) <= max_batch else runs[:max_batch]

    def _within(self, group: Group, runs: list[str], limit: float) -> int:
        """How many of these have no more rows than that; at least one."""
        rows = accumulate(self._policy.demands.rows(group.residents[run]) for run in runs)
        return max(1, sum(total <= limit for total in rows))

    def rows(self, group: Group) -> int:
        """Rows of its residents that are not paused."""
        rows = self._policy.demands.rows
        return sum(rows(state) for run, state in group.residents.items() if run not in group.paused)

    def _leaving_rows(self, group: Group) -> int:
        of, states = self.leaving
        return sum(map(self._policy.demands.rows, states)) if of is group else 0
