"""Fcfs: first come first served within a batch key, round robin over batch keys."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from itertools import islice

from steploom.config import EngineConfig
from steploom.sched.policy import Batch, Policy
from steploom.sched.state import Clock, RequestState

MAX_LINKS = 4096
"""How many guesses the policy remembers an observed key for."""


class _Queue:
    """The waiting requests of one guess: lower priorities first, then by arrival. All operations are O(1).

    ``OrderedDict`` and not ``dict``: taking the first entry of a dict walks over the holes that earlier ones left.
    """

    __slots__ = ("group", "guess", "levels", "priorities")

    def __init__(self, guess: str, group: _Group) -> None:
        self.guess = guess
        self.group = group
        self.levels: dict[int, OrderedDict[str, RequestState]] = {}
        self.priorities: list[int] = []

    def push(self, state: RequestState, front: bool) -> None:
        priority, request_id = state.request.priority, state.request.request_id
        level = self.levels.get(priority)
        if level is None:
            level = self.levels[priority] = OrderedDict()
            insort(self.priorities, priority)
        level[request_id] = state
        if front:
            level.move_to_end(request_id, last=False)

    def head(self) -> RequestState:
        return next(iter(self.levels[self.priorities[0]].values()))

    def remove(self, state: RequestState) -> None:
        priority = state.request.priority
        level = self.levels[priority]
        del level[state.request.request_id]
        if not level:
            del self.levels[priority]
            self.priorities.remove(priority)


class _Group:
    """Requests that may share a forward: the residents of a batch key, and the queues that feed them.

    ``turn`` orders the rotation: the group with the lowest one is next.
    """

    __slots__ = ("key", "queues", "residents", "turn")

    def __init__(self, key: str) -> None:
        self.key = key
        self.turn = 0
        self.residents: dict[str, RequestState] = {}
        self.queues: dict[str, _Queue] = {}


class Fcfs(Policy):
    """First come first served within a batch key (lower ``priority`` first), round robin over batch keys.

    A tick steps the residents of one group, oldest first, and lets waiting requests of that group join while there is
    room. Groups take turns. A group that has no residents cannot run before a worker has a place for one of its
    requests; until then others run, and it keeps its turn: the first free place is its own. So no shape blocks
    another, none is starved, and a full batch is never drained to make room for a different shape.

    A request belongs to the group of its observed key. Before there is one it belongs to the group that the last
    request of the same guess turned out to be in, or to a group of its own guess.
    """

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        self._turn = 0
        self._groups: dict[str, _Group] = {}
        # Two rotations, each ordered by turn, so that finding the next group that can run never walks over those
        # that cannot: groups with residents, and groups whose requests all wait.
        self._active: OrderedDict[str, _Group] = OrderedDict()
        self._pending: OrderedDict[str, _Group] = OrderedDict()
        self._queues: dict[str, _Queue] = {}
        self._home: dict[str, _Group] = {}
        self._links: dict[str, str] = {}

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits in the queue of its guess."""
        queue = self._queues.get(state.guess)
        if queue is None:
            group = self._group(self._links.get(state.guess, state.guess))
            queue = self._queues[state.guess] = group.queues[state.guess] = _Queue(state.guess, group)
            self._settle(group)
        queue.push(state, front)

    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone. O(1)."""
        queue = self._queues[state.guess]
        queue.remove(state)
        if not queue.levels:
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
        group = self._next(free)
        if group is None:
            return Batch(None, [], [])
        residents = group.residents
        cached = list(residents) if len(residents) <= max_batch else list(islice(residents, max_batch))
        room = min(max_batch - len(cached), free)
        joining = self._join(group, room) if group.queues and room > 0 else []
        self._turn += 1
        group.turn = self._turn
        self._active.move_to_end(group.key)
        return Batch(None if group.key.startswith("?") else group.key, cached, joining)

    def _next(self, free: int) -> _Group | None:
        """The group whose turn it is among those that can run."""
        active = next(iter(self._active.values())) if self._active else None
        if free > 0 and self._pending:
            pending = next(iter(self._pending.values()))
            if active is None or pending.turn < active.turn:
                return pending
        return active

    def _join(self, group: _Group, room: int) -> list[RequestState]:
        """Makes up to ``room`` waiting requests of the group resident."""
        joining: list[RequestState] = []
        while group.queues and len(joining) < room:
            state = self._first(group)
            group.residents[state.run_id] = state  # First, or a group with an empty queue would be forgotten.
            self._home[state.run_id] = group
            self.withdraw(state)
            joining.append(state)
        self._settle(group)
        return joining

    def _first(self, group: _Group) -> RequestState:
        """The waiting request of the group that is next; O(1) in their number, linear in that of their guesses."""
        heads = [queue.head() for queue in group.queues.values()]
        return heads[0] if len(heads) == 1 else min(heads, key=lambda state: (state.request.priority, state.arrival))

    def _learn(self, guess: str, group: _Group) -> None:
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
            del old.queues[guess]
            group.queues[guess] = queue
            queue.group = group
        for state in [s for s in old.residents.values() if s.batch_key is None and s.guess == guess]:
            self._move(state, group)
        self._settle(old)

    def _move(self, state: RequestState, group: _Group) -> None:
        """Makes a resident a member of ``group``, as its youngest."""
        del self._home[state.run_id].residents[state.run_id]
        group.residents[state.run_id] = state
        self._home[state.run_id] = group

    def _drop(self, queue: _Queue) -> None:
        """Forgets an empty queue."""
        del self._queues[queue.guess]
        del queue.group.queues[queue.guess]
        self._settle(queue.group)

    def _group(self, key: str) -> _Group:
        """The group of ``key``, made if there is none."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
        return group

    def _settle(self, group: _Group) -> None:
        """Puts the group into the rotation that it belongs to now, at the end if it was not there."""
        rotation = self._active if group.residents else self._pending if group.queues else None
        if rotation is not None and group.key in rotation:
            return
        self._active.pop(group.key, None)
        self._pending.pop(group.key, None)
        if rotation is None:
            del self._groups[group.key]
            return
        self._turn += 1
        group.turn = self._turn
        rotation[group.key] = group
