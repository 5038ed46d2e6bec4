"""Fcfs: first come first served within a batch key, round robin over batch keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from steploom.config import EngineConfig
from steploom.sched.policy import Batch, Policy
from steploom.sched.queues import Group, Queue
from steploom.sched.state import Clock, RequestState

MAX_LINKS = 4096
"""How many guesses the policy remembers an observed key for."""

TERM = 8
"""Full batches that the favoured group may admit before the favour passes to another crowd."""


class Fcfs(Policy):
    """First come first served within a batch key (lower ``priority`` first), round robin over batch keys.

    A tick steps the residents of one group, oldest first, and lets waiting requests of that group join while there is
    room. Groups take turns. A group that has no residents cannot run before a worker has a place for one of its
    requests; until then others run, and it keeps its turn. So a full batch is never drained to make room for a
    different shape.

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

    A request belongs to the group of its observed key. Before there is one it belongs to the group that the last
    request of the same guess turned out to be in, or to a group of its own guess.
    """

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self._turn = 0
        self._chosen = ""  # Key of the group whose turn it was last.
        self._groups: dict[str, Group] = {}
        # Two rotations, each ordered by turn, so that finding the next group that can run never walks over those
        # that cannot: groups with residents, and groups whose requests all wait.
        self._active: OrderedDict[str, Group] = OrderedDict()
        self._pending: OrderedDict[str, Group] = OrderedDict()
        self._queues: dict[str, Queue] = {}
        self._home: dict[str, Group] = {}
        self._links: dict[str, str] = {}
        self._crowds: OrderedDict[str, Group] = OrderedDict()
        self._crowd = max(2, (config.batch_limit + 1) // 2)
        self._favoured: Group | None = None
        self._term = 0  # How many more requests the favoured group may admit before the favour passes on.
        self._let_in = False  # Whether a pending group has got a place since the favoured one was chosen.

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits in the queue of its guess."""
        queue = self._queues.get(state.guess)
        if queue is None:
            group = self._group(self._links.get(state.guess, state.guess))
            queue = self._queues[state.guess] = Queue(state.guess, group)
            group.add(queue)
        queue.push(state, front)
        self._settle(queue.group)

    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone. O(1) on average."""
        queue = self._queues[state.guess]
        queue.remove(state)
        if not queue.states:
            self._drop(queue)

    def retire(self, state: RequestState) -> None:
        """The resident ``state`` is gone."""
        group = self._home.pop(state.run_id)
        del group.residents[state.run_id]
        if not group.residents:
            self._settle(group)

    def observe(self, state: RequestState) -> None:
        """Moves ``state`` to the group of its observed key, and links its guess to that group."""
        key = state.batch_key
        assert key is not None
        old, group = self._home[state.run_id], self._group(key)
        if old is not group:
            self._move(state, group)
            self._settle(group)
            self._settle(old)
        self._learn(state.guess, group)

    def choose(self, max_batch: int, free: int) -> Batch:
        """The residents of the group whose turn it is, and those of its waiting requests that find room."""
        group, room = self._next(max_batch, free)
        if group is None:
            return Batch(None, [], [])
        residents = group.residents
        cached = list(residents) if len(residents) <= max_batch else list(islice(residents, max_batch))
        joining: list[RequestState] = []
        if room > 0 and group.waiting and len(cached) < max_batch:
            joining = self._join(group, min(max_batch - len(cached), room))
        self._turn += 1
        group.turn = self._turn
        self._active.move_to_end(group.key)
        self._chosen = group.key
        return Batch(None if group.key.startswith("?") else group.key, cached, joining)

    def extend(self, members: Sequence[str], max_batch: int, free: int) -> Batch:
        """Who else of the members' group finds room: first its residents, then those of its waiting requests."""
        group, room = self._groups.get(self._chosen), max_batch - len(members)
        if group is None or room <= 0:
            return Batch(None, [], [])
        there = set(members)
        cached = list(islice((run for run in group.residents if run not in there), room))
        joining: list[RequestState] = []
        room = min(room - len(cached), self._open(group, max_batch, free))
        if room > 0 and group.waiting:
            joining = self._join(group, room)
        return Batch(None if group.key.startswith("?") else group.key, cached, joining)

    def _open(self, group: Group, max_batch: int, free: int) -> int:
        """How many of the free places the group may take."""
        if free <= 0 or len(self._groups) == 1:
            return free
        favoured = self._elect(max_batch)
        return free if group is favoured else self._room(favoured, max_batch, free)

    def stay(self, state: RequestState) -> None:
        """``state`` is resident after all, before those of its group that came later than it.

        If the worker has no room for one of these until ``state`` is done, it must not be chosen instead.
        """
        group = self._group(state.batch_key or self._links.get(state.guess, state.guess))
        residents = group.residents
        others = list(residents.items())
        residents.clear()
        residents.update((run, other) for run, other in others if other.arrival < state.arrival)
        residents[state.run_id] = state
        residents.update((run, other) for run, other in others if other.arrival > state.arrival)
        self._home[state.run_id] = group
        self._settle(group)

    def _next(self, max_batch: int, free: int) -> tuple[Group | None, int]:
        """The group whose turn it is among those that can run, and how many places it may take."""
        group = next(iter(self._active.values())) if self._active else None
        if free <= 0:
            return group, 0
        if len(self._groups) == 1:
            return next(iter(self._groups.values())), free
        favoured = self._elect(max_batch)
        room = self._room(favoured, max_batch, free)
        if room > 0 and self._pending:
            pending = next(iter(self._pending.values()))
            if group is None or pending.turn < group.turn:
                group = pending
        if favoured is None:
            return group, room
        if not favoured.residents and favoured.waiting and (group is None or favoured.turn < group.turn):
            group = favoured
        return group, free if group is favoured else room

    def _room(self, favoured: Group | None, max_batch: int, free: int) -> int:
        """How many of the free places groups that are not favoured may take."""
        if max_batch == 1:  # Nothing is ever shared.
            return free
        taken = len(self._home)
        places = taken + free
        if favoured is None:
            return free if len(self._active) < max(max_batch, places - max_batch) or not self._pending else 0
        own = len(favoured.residents)
        kept = min(max_batch, own + favoured.waiting)
        return min(free, max(1, places - kept) - (taken - own))

    def _elect(self, max_batch: int) -> Group | None:
        """The favoured group, another one if the favour passes on now."""
        crowds, favoured = self._crowds, self._favoured
        if max_batch == 1 or (favoured is None and not crowds):
            return None
        if favoured is not None:
            waits = crowds.get(favoured.key) is favoured
            if (self._term > 0 or len(crowds) == 1) if waits else (self._pending and not self._let_in):
                return favoured
            if waits:
                crowds.move_to_end(favoured.key)
        self._favoured = next(iter(crowds.values())) if crowds else None
        self._term, self._let_in = TERM * max_batch, False
        return self._favoured

    def _join(self, group: Group, room: int) -> list[RequestState]:
        """Makes up to ``room`` waiting requests of the group resident."""
        residents, home = group.residents, self._home
        opening = not residents
        joining: list[RequestState] = []
        while group.waiting and len(joining) < room:
            queue = group.first()
            state = queue.pop()
            residents[state.run_id] = state  # First, or a group with an empty queue would be forgotten.
            home[state.run_id] = group
            if not queue.states:
                self._drop(queue)
            joining.append(state)
        if group is self._favoured:
            self._term -= len(joining)
        elif opening:
            self._let_in = True
        if opening:
            self._settle(group)
        return joining

    def _learn(self, guess: str, group: Group) -> None:
        """Requests of this guess belong to ``group``, unless the group that they are linked to is alive.

        The exception keeps a guess that covers several observed keys from being moved about by every report.
        """
        linked = self._links.get(guess)
        if linked == group.key or linked in self._active:
            return
        self._links.pop(guess, None)
        self._links[guess] = group.key
        if len(self._links) > MAX_LINKS:
            del self._links[next(iter(self._links))]
        queue = self._queues.get(guess)
        old = queue.group if queue is not None else self._groups.get(linked or guess)
        if old is None or old is group:
            return
        if queue is not None:
            old.discard(queue)
            group.add(queue)
            if old is self._favoured:
                self._favoured = group
        for state in [s for s in old.residents.values() if s.batch_key is None and s.guess == guess]:
            self._move(state, group)
        self._settle(group)
        self._settle(old)

    def _move(self, state: RequestState, group: Group) -> None:
        """Makes a resident a member of ``group``, as its youngest."""
        del self._home[state.run_id].residents[state.run_id]
        group.residents[state.run_id] = state
        self._home[state.run_id] = group

    def _drop(self, queue: Queue) -> None:
        """Forgets an empty queue."""
        del self._queues[queue.guess]
        queue.group.discard(queue)
        self._settle(queue.group)

    def _group(self, key: str) -> Group:
        """The group of ``key``, made if there is none."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
        return group

    def _settle(self, group: Group) -> None:
        """Puts the group where it belongs now: among the crowds or not, and into one of the rotations or none.

        It goes to the end of a rotation that it was not in.
        """
        key, waiting = group.key, group.waiting
        if not waiting:
            self._crowds.pop(key, None)
        elif waiting + len(group.residents) >= self._crowd:
            self._crowds[key] = group
        rotation = self._active if group.residents else self._pending if waiting else None
        if rotation is not None and key in rotation:
            return
        self._active.pop(key, None)
        self._pending.pop(key, None)
        if rotation is None:
            del self._groups[key]
            return
        self._turn += 1
        group.turn = self._turn
        rotation[key] = group
