"""Fcfs: first come first served within a batch key, round robin over batch keys."""

from __future__ import annotations

import math
from collections import OrderedDict

from steploom.config import EngineConfig
from steploom.sched.groups import Group
from steploom.sched.lines import Rank
from steploom.sched.ranked import Ranked
from steploom.sched.state import Clock, RequestState

TERM = 8
"""Full batches that the favoured group may admit before the favour passes to another crowd."""


class Fcfs(Ranked):
    """First come first served within a batch key, round robin over batch keys: what requests cost does not count.

    A tick steps the residents of one group, oldest first, and lets waiting requests of that group join while there is
    room. Groups of the best class take turns. A group that has no residents cannot run before a worker has a place for
    one of its requests; until then others run, and it keeps its turn. So a full batch is never drained to make room
    for a different shape.

    A place is held to the end of its request, so many different shapes could hold them all, and leave none for the
    shape that most requests have. Therefore not every group may take a free place:

    - A *crowd* is a group in which somebody waits and that has half a full batch of requests in all. One crowd at a
      time is *favoured*: it may take any free place, the others together only what its batch leaves over, but at
      least one. The favour passes on when nobody waits in it, though not before a group without a place got one if
      one waits for it; and once it has admitted ``TERM`` full batches while there are other crowds.
    - While there is no crowd, as many groups hold places as leave a full batch free, or as a full batch has members,
      whichever is more. If more want to, no group takes another place until one of these has ended.

    Hence a place stays free while somebody waits only for a crowd: the favoured one takes it at its next turn, and one
    to come finds room where a worker has more places than one batch. That costs no tick, since a tick runs one group:
    none is empty if anything is resident or waits. Who is let in goes by turn, and the others' places come free sooner
    or later, so nobody starves.
    """

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self._crowds: OrderedDict[str, Group] = OrderedDict()
        self._crowd = max(2, (config.batch_limit + 1) // 2)
        self._favoured: Group | None = None
        self._term = 0  # How many more requests the favoured group may admit before the favour passes on.
        self._let_in = False  # Whether a pending group has got a place since the favoured one was chosen.

    def rank(self, state: RequestState) -> Rank:
        """None: who came first is first."""
        return ()

    def urgency(self, state: RequestState, now: float, group_s: float) -> Rank:
        """Who came first is first."""
        return (state.arrival,)

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits in its group, which may be a crowd now."""
        super().enqueue(state, front=front)
        self._count(self._groups.home[state.run_id])

    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone."""
        group = self._groups.home[state.run_id]
        super().withdraw(state)
        self._count(group)

    def observe(self, state: RequestState) -> None:
        """Moves ``state`` to the group of its observed key, and those of its guess: and the favour with them."""
        led = self._groups.led(state.guess)
        super().observe(state)
        group = self._groups.home[state.run_id]
        if led is not None:
            self._count(led)
            if led is self._favoured and led is not group and self._groups.led(state.guess) is group:
                self._favoured = group
        self._count(group)

    def stay(self, state: RequestState) -> None:
        """``state`` is resident after all."""
        super().stay(state)
        self._count(self._groups.home[state.run_id])

    def _count(self, group: Group) -> None:
        """Notes whether the group is a crowd."""
        waiting = len(group.line)
        if not waiting:
            self._crowds.pop(group.key, None)
        elif waiting + len(group.residents) >= self._crowd:
            self._crowds[group.key] = group

    def _turn(self, now: float, max_batch: int, free: int) -> Group | None:
        """The group of the best class whose turn it is, among those that can run."""
        active, pending = self._groups.active, self._groups.pending
        opens = bool(pending) and free > 0
        if len(active) <= 1 and not opens:
            return next(iter(active.values()), None)
        aged = self._aged(now) if opens and self._kept(now) else None
        if aged is not None:
            return self._owed(aged, now, max_batch, free, math.inf) or aged
        overdue = self._overdue(now)
        if overdue is not None:
            return overdue
        groups = list(active.values())
        if opens:
            favoured = self._elect(max_batch)
            following = self._next(now)
            owed = self._owed(following, now, max_batch, free, following.line.priority)
            if owed is not None:
                return owed
            if _above(following, favoured) or self._leaves_over(favoured, max_batch, free) > 0:
                groups.append(following)
            if favoured is not None and not favoured.residents and len(favoured.line):
                groups.append(favoured)
            groups = [group for group in groups if group.residents or self._room.in_memory(group, now)]
        return min(groups, key=lambda group: (group.priority, group.turn), default=None)

    def _kept(self, now: float) -> int:
        """A place is kept for who has waited for too long behind better classes; else all have their turn."""
        if not super()._kept(now):
            return 0
        oldest, first = next(iter(self._groups.pending.values())), self._groups.first(now)
        better = [group.priority for group in (first, *self._groups.active.values()) if group is not None]
        return int(min(better) < oldest.line.priority)

    def _next(self, now: float) -> Group:
        """The group without residents whose turn it is, of the best class, by user; there must be one."""
        oldest = next(iter(self._groups.pending.values()))
        first = self._groups.first(now) or oldest
        return first if first.line.priority < oldest.line.priority else self._groups.in_turn(oldest, now)

    def _places(self, group: Group, max_batch: int, free: int, now: float) -> int:
        """How many of the free places the group may take: fewer than all while another one is favoured."""
        places = super()._places(group, max_batch, free, now)
        groups = self._groups
        if group is self._due:
            return places
        if places <= 0 or len(groups.active) + len(groups.pending) == 1 or (not group.residents and self._kept(now)):
            return places
        favoured = self._elect(max_batch)
        if group is favoured or _above(group, favoured):
            return places
        return min(places, self._leaves_over(favoured, max_batch, free))

    def _leaves_over(self, favoured: Group | None, max_batch: int, free: int) -> int:
        """How many of the free places groups that are not favoured may take."""
        if max_batch == 1:  # Nothing is ever shared.
            return free
        active, pending = self._groups.active, self._groups.pending
        taken = self._groups.taken
        places = taken + free
        if favoured is None:
            return free if len(active) < max(max_batch, places - max_batch) or not pending else 0
        own = len(favoured.residents)
        kept = min(max_batch, own + len(favoured.line))
        return min(free, max(1, places - kept) - (taken - own))

    def _elect(self, max_batch: int) -> Group | None:
        """The favoured group, another one if the favour passes on now."""
        crowds, favoured = self._crowds, self._favoured
        if max_batch == 1 or (favoured is None and not crowds):
            return None
        if favoured is not None:
            waits = crowds.get(favoured.key) is favoured
            if (self._term > 0 or len(crowds) == 1) if waits else (self._groups.pending and not self._let_in):
                return favoured
            if waits:
                crowds.move_to_end(favoured.key)
        self._favoured = next(iter(crowds.values())) if crowds else None
        self._term, self._let_in = TERM * max_batch, False
        return self._favoured

    def _join(self, group: Group, max_batch: int, free: int, now: float) -> list[RequestState]:
        """Makes waiting requests of the group resident, and counts them."""
        opening = not group.residents
        joining = super()._join(group, max_batch, free, now)
        if group is self._favoured:
            self._term -= len(joining)
        elif opening:
            self._let_in = True
        self._count(group)
        return joining


def _above(group: Group, favoured: Group | None) -> bool:
    """Whether somebody of a better class waits in the group than in the favoured one, or runs there."""
    if favoured is None or not (favoured.residents or len(favoured.line)) or not len(group.line):
        return False
    return group.line.priority < favoured.priority
