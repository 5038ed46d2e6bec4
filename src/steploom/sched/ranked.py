"""Ranked: what policies share that order requests by what they cost: who joins, and whose turn a tick is."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from steploom.config import EngineConfig
from steploom.sched.groups import PASSES, Group, Groups
from steploom.sched.ledger import Ledger
from steploom.sched.lines import Order, Rank
from steploom.sched.outlook import Outlook
from steploom.sched.policy import Batch, Policy
from steploom.sched.room import Room
from steploom.sched.state import Clock, RequestState

PATIENCE = 50
"""A group that was passed over for so many times the seconds of its tick has the next one."""

PREEMPT_GAIN = 2.0
"""Who is paused has so many times as much left to do, or to spare, as the one that goes first needs."""


class Ranked(Policy):
    """Requests in an order of the subclass's, in groups that share a forward; priority classes and users above it.

    A tick steps one group, and lets waiting requests of it join while there is room: up to ``max_batch`` requests, and
    with ``max_batch="auto"`` up to the knee of its cost; and while there is memory. The group is

    1. one that was passed over for ``PATIENCE`` times the seconds of its tick, so that no shape starves, and who is
       overtaken has its share of the time;
    2. else one that somebody can join: so who finds a free place joins at once;
    3. else the one with the most urgent resident.

    Among groups without residents the one with the first request in the subclass's order is let in next. One that has
    waited for ``priority_ageing_s`` for a place goes before all others, and a free place is kept for it.

    A resident that cannot be done in time any more is paused for one that waits and can be. With ``preempt`` also one
    is paused that can afford it, when somebody waits that is more urgent. Who is paused keeps its place in the worker,
    goes on as soon as there is room in the batch, before anybody joins, and is never paused again.
    """

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self._order = Order(self.rank, self.late, Ledger(config.user_weights or {}), config.priority_ageing_s)
        self._groups = Groups(self._order)
        self._valued = False
        self._chosen: Group | None = None
        self._due: Group | None = None  # A group with residents that takes a free place before one without.
        self._paused_before: set[str] = set()
        self._outlook = Outlook(self, self._groups, self._order)
        self._room = Room(self, self._groups)

    @abstractmethod
    def rank(self, state: RequestState) -> Rank:
        """The order of those that wait; it changes only when more is known of ``state`` (:meth:`revalue`)."""

    @abstractmethod
    def urgency(self, state: RequestState, now: float, group_s: float) -> Rank:
        """The order of residents, of any group. ``group_s``: seconds of a tick of its group, as it is now."""

    def late(self, state: RequestState, now: float) -> bool:
        """Whether ``state``, which waits, cannot be done in time any more."""
        return False

    def lost(self, state: RequestState, now: float, group_s: float) -> bool:
        """Whether the resident ``state`` cannot be done in time any more: by :meth:`urgency` it is behind who can."""
        return False

    def lost_from(self, state: RequestState, group_s: float) -> float:
        """The clock's reading before which ``state`` is not :meth:`lost`, while its ticks take so long at most."""
        return math.inf if type(self).lost is Ranked.lost else -math.inf

    def spares(self, victim: RequestState, other: RequestState, now: float, group_s: float) -> bool:
        """Whether ``victim`` can afford to be paused until ``other`` is done."""
        return False

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits in its group."""
        self._groups.push(state, self.clock(), front)

    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone."""
        self._groups.remove(state, self.clock())

    def retire(self, state: RequestState) -> None:
        """The resident ``state`` is gone."""
        self._groups.release(state, self.clock())
        self._paused_before.discard(state.run_id)

    def stay(self, state: RequestState) -> None:
        """``state`` is resident after all, before those of its group that came later than it."""
        now = self.clock()
        self._groups.settle(state, self._groups.of_state(state, now))

    def observe(self, state: RequestState) -> None:
        """Moves ``state`` to the group of its observed key, and those of its guess."""
        self._groups.observed(state, self.clock())

    def revalue(self, states: Sequence[RequestState]) -> None:
        """Gives them new places by their rank; one that a quarantine holds back has none."""
        self._outlook.forget()
        if not self._valued:  # Before, nothing was known: users were charged by guesses.
            self._valued = True
            self._groups.forget()
        for state in states:
            if state.run_id in self._groups.home:
                self._groups.revalue(state, self.clock())

    def wait_s(self, state: RequestState) -> float:
        """Until it has its turn among those that wait, and a place is free."""
        return self._outlook.wait_s(state, self.clock())

    def place_s(self) -> float:
        """Until the first resident is done, if all places are taken."""
        return self._outlook.place_s(self.clock())

    def done_s(self, state: RequestState, group: Group, now: float) -> float:
        """Seconds until the resident ``state`` is done, or is paused since it is too late."""
        tick_s = self._tick_s(group)
        return 0.0 if self.lost(state, now, tick_s) else self.demands.remaining_s(state, tick_s)

    def choose(self, max_batch: int, free: int) -> Batch:
        """The residents of the group whose turn it is, and those of its waiting requests that find room."""
        now, self._room.leaving, self._due = self.clock(), (None, ()), None
        group = self._turn(now, max_batch, free)
        if group is None:
            return Batch(None, [], [])
        places = self._claim(group, max_batch, free, now)
        overtaken = not group.residents and group is self._groups.overtaken(now)
        self._groups.turns += 1
        self._chosen, group.since, group.turn = group, now, self._groups.turns
        if group.paused:
            self._resume(group, max_batch, now)
        joining: list[RequestState] = []
        cached = self._room.steps(group, max_batch)
        if places > 0:
            joining = self._join(group, max_batch, places, now)
            if overtaken:  # it would be passed over again, in its place
                best = int(min(one.priority for one in self._groups.active.values()))
                for state in joining:
                    state.priority = best
                group.touch()
            if len(joining) < places and len(group.line):
                joining += self._preempt(group, cached, now)
                cached = [run for run in cached if run not in group.paused][: max_batch - len(joining)]
        return Batch(group.batch_key, cached, joining)

    def extend(self, members: Sequence[str], max_batch: int, free: int) -> Batch:
        """Who else of the members' group finds room: first its residents, then those of its waiting requests."""
        group, room, self._due = self._chosen, max_batch - len(members), None
        if group is None or room <= 0 or not (group.residents or len(group.line)):
            return Batch(None, [], [])
        if self.costs.limit(group.batch_key) < math.inf:
            return Batch(None, [], [])
        now, self._room.leaving = self.clock(), (group, [self.ending[run] for run in members if run in self.ending])
        # Those whose last step this is still have their rows in the tick.
        gone = len(members) - sum(run in group.residents for run in members)
        if group.paused:
            self._resume(group, max_batch - gone, now)
        there = set(members) | group.paused.keys()
        cached = [] if self._room.over_knee(group) else [run for run in group.residents if run not in there][:room]
        joining: list[RequestState] = []
        places = self._claim(group, max_batch, free, now)
        if room > len(cached) and places > 0 and (group.residents or self._opens()):
            joining = self._join(group, max_batch - gone, places, now)
        return Batch(group.batch_key, cached, joining)

    def _turn(self, now: float, max_batch: int, free: int) -> Group | None:
        """The group of the next tick; None if there is none that can run."""
        active, pending = self._groups.active, self._groups.pending
        if len(active) <= 1 and not (pending and free > 0):
            return next(iter(active.values()), None)
        overdue = self._overdue(now)
        if overdue is not None:
            return overdue
        best, foremost = self._groups.best()
        newcomer = self._newcomer(now, max_batch, free, best)
        if newcomer is not None:
            return newcomer
        return self._foremost(foremost, now)

    def _overdue(self, now: float) -> Group | None:
        """The group with residents that was passed over for too long, if there is one."""
        late, oldest, most, version = None, None, PATIENCE, self.demands.version
        for group in self._groups.active.values():
            if group.version != version:
                self._tick_s(group)
            passed = (now - group.since) / group.seconds
            if passed > most:
                late, most = group, passed
            if oldest is None or group.turn < oldest.turn:
                oldest = group
        if late is None and oldest is not None and self._groups.turns - oldest.turn > PASSES:
            return oldest
        return late

    def _newcomer(self, now: float, max_batch: int, free: int, best: float) -> Group | None:
        """The group that somebody can join now, of the best class; by user, and then one that has no residents."""
        if free <= 0:
            return None
        groups, opening = self._groups, None
        if self._kept(now):
            opening = self._aged(now)
        elif groups.pending and self._opens():
            first = groups.first(now)
            if first is not None and first.line.priority <= best and self._room.in_memory(first, now):
                opening = first
                if first.line.priority < best:
                    return first
        return self._owed(opening, now, max_batch, free, best) or opening

    def _claim(self, group: Group, max_batch: int, free: int, now: float) -> int:
        """How many of the free places the group takes: none if a user has had less that waits for one elsewhere."""
        if free <= 0 or not group.line.waiting:
            return 0
        groups = self._groups
        if group is self._due or not group.residents or len(groups.ledger.accounts) <= 1 or self._room.for_all(free):
            return self._places(group, max_batch, free, now)
        first = groups.first(now) if self._opens() else None
        rivals = [one for one in (first, self._joinable(group.line.priority, now, max_batch, free)) if one is not None]
        least = min((groups.had(rival, now) for rival in rivals), default=math.inf)
        return self._places(group, max_batch, free, now) if groups.had(group, now) <= least else 0

    def _owed(self, rival: Group | None, now: float, max_batch: int, free: int, best: float) -> Group | None:
        """The group with residents that somebody can join, of a user that has had less than that of the ``rival``.

        Among equals the group that nobody has joined for longest.
        """
        group = self._joinable(best, now, max_batch, free)
        if group is None or rival is None:
            return None if self._kept(now) else group
        if self._groups.had(group, now) >= self._groups.had(rival, now):
            return None
        self._due = group
        return group

    def _joinable(self, best: float, now: float, max_batch: int, free: int) -> Group | None:
        """The group with residents that somebody can join, of the user that has had the least."""
        groups = self._groups
        found = [
            (groups.had(group, now), group.joined, group.key, group) for group in groups.active.values()
            if len(group.line) and group.line.priority <= best and self._room.for_one(group, max_batch, free, now)
        ]  # fmt: skip
        return min(found)[3] if found else None

    def _aged(self, now: float) -> Group | None:
        """The group that has waited for too long for a place, or one of another user that has had less."""
        oldest = next(iter(self._groups.pending.values()))
        chosen = self._groups.in_turn(oldest, now)
        return next((group for group in (chosen, oldest) if self._room.in_memory(group, now)), None)

    def _opens(self) -> bool:
        """Whether one more group may have residents: so many that a full batch of another one finds places."""
        batch, places = self.config.batch_limit, self.config.resident_limit
        return len(self._groups.active) < max(places - batch, batch, 1)

    def _kept(self, now: float) -> int:
        """Places that are kept for groups that have waited for too long."""
        return int(self._groups.overtaken(now) is not None)

    def _places(self, group: Group, max_batch: int, free: int, now: float) -> int:
        """How many of the free places the group may take."""
        if group is self._due:
            return 1
        return free - self._kept(now) if group.residents and self._groups.pending else free

    def _join(self, group: Group, max_batch: int, free: int, now: float) -> list[RequestState]:
        """Makes waiting requests of the group resident, as far as there is room."""
        joining: list[RequestState] = []
        most = min(free, max_batch - len(group.residents) + len(group.paused), len(group.line.waiting))
        while len(joining) < most and self._room.for_next(group, now):
            joining.append(self._groups.admit(group, now))
        return joining

    def _resume(self, group: Group, max_batch: int, now: float) -> None:
        """Those that were paused go on as far as there is room, the most urgent first."""
        seconds = self._tick_s(group)
        paused = sorted(group.paused.values(), key=lambda state: self.urgency(state, now, seconds))
        for state in paused:
            if group.stepping >= max_batch or (group.stepping and not self._room.fits(group, state)):
                break
            del group.paused[state.run_id]
            group.touch()

    def _preempt(self, group: Group, cached: list[str], now: float) -> list[RequestState]:
        """One resident of a full batch is paused for one that waits and is more urgent, if there are two such."""
        first, seconds = group.line.first(now), self._tick_s(group)
        lost = set[RequestState]() if self.config.preempt else self._lost(group, first, now, seconds)
        if not (lost or self.config.preempt) or not self._room.in_memory(group, now):
            return []
        steps = [group.residents[run] for run in cached if run not in self._paused_before]
        worst = max((state.priority for state in steps), default=math.inf)
        steps = [state for state in steps if state.priority == worst and (state in lost or not lost)]
        victim = max(steps, key=lambda state: self.urgency(state, now, seconds), default=None)
        if victim is None or not self._before(first, victim, now, seconds):
            return []
        group.paused[victim.run_id] = victim
        group.touch()
        self._paused_before.add(victim.run_id)
        return [self._groups.admit(group, now)]

    def _lost(self, group: Group, first: RequestState, now: float, seconds: float) -> set[RequestState]:
        """The residents that are too late; none if ``first``, which waits, is too late for their place itself."""
        if self.late(first, now):
            return set()
        return group.watch.lost(self, group.residents, now, seconds, self.demands.version)

    def _before(self, first: RequestState, victim: RequestState, now: float, seconds: float) -> bool:
        """Whether ``first``, which waits, goes before ``victim``, which runs."""
        above = first.priority - victim.priority
        if above > 0 or (above < 0 and self.config.preempt):
            return above < 0
        if not self.urgency(first, now, seconds) < self.urgency(victim, now, seconds):
            return False
        if self.lost(victim, now, seconds):
            return not self.late(first, now)
        return self.config.preempt and self.spares(victim, first, now, seconds)

    def _tick_s(self, group: Group) -> float:
        """Seconds of a tick of the group as it is."""
        version = self.demands.version
        if group.version != version:
            any_one = next(iter(group.residents.values()))
            company = self._room.rows(group) - self.demands.rows(any_one)
            group.seconds, group.version = max(1e-6, self.demands.step_s(any_one, company)), version
        return group.seconds

    def _foremost(self, groups: Sequence[Group], now: float) -> Group | None:
        """Of groups with residents the one that has the most urgent one, also of those that wait for their places."""
        if len(groups) <= 1:
            return groups[0] if groups else None
        return min(groups, key=lambda group: self._urgency(group, now))

    def _urgency(self, group: Group, now: float) -> Rank:
        """That of its most urgent resident, or of who is the next one."""
        seconds, states = self._tick_s(group), group.steps
        if len(group.line):
            states.append(group.line.first(now))
        return min(self.urgency(state, now, seconds) for state in states)
