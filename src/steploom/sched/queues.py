"""Who waits, and where: a queue for each guess, and groups of requests that may share a forward."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace

from steploom.sched.state import RequestState

Rank = tuple[int, bool, int, str]
"""Priority, False if it goes before others of that priority, arrival, run id: the lowest is next."""

SLACK = 64
"""Stale entries that a heap may have, whatever its size."""


class Queue:
    """The waiting requests of one guess, which feed ``group``, by rank.

    Ranks that come in order, as most do, are appended to ``line``; the others go into ``heap``. A request that is
    withdrawn leaves ``states`` at once, its rank when it comes up, or when stale ranks are the majority. So ranks are
    bounded, no payload is kept, and to withdraw is O(1) on average.
    """

    __slots__ = ("group", "guess", "heap", "line", "states")

    def __init__(self, guess: str, group: Group) -> None:
        self.guess = guess
        self.group = group
        self.line: deque[Rank] = deque()
        self.heap: list[Rank] = []
        self.states: dict[str, RequestState] = {}

    def push(self, state: RequestState, front: bool) -> None:
        """``state`` waits from now on."""
        rank = (state.request.priority, not front, state.arrival, state.run_id)
        self.states[state.run_id] = state
        self.group.waiting += 1
        if self.line and rank < self.line[-1]:
            heappush(self.heap, rank)
        else:
            self.line.append(rank)
        if len(self.states) == 1 or self._lowest()[0] is rank:
            self.group.enter(self)

    def remove(self, state: RequestState) -> None:
        """``state`` no longer waits."""
        states = self.states
        del states[state.run_id]
        self.group.waiting -= 1
        if len(self.line) + len(self.heap) > 2 * len(states) + SLACK:
            self.line = deque(rank for rank in self.line if rank[3] in states)
            self.heap = [rank for rank in self.heap if rank[3] in states]
            heapify(self.heap)

    def first(self) -> Rank:
        """The rank of the next request; there must be one."""
        while True:
            rank, in_line = self._lowest()
            if rank[3] in self.states:
                return rank
            self._skip(in_line)

    def pop(self) -> RequestState:
        """Takes out the next request; there must be one."""
        line, heap, states = self.line, self.heap, self.states
        while True:
            rank = heappop(heap) if heap and not (line and line[0] < heap[0]) else line.popleft()
            state = states.pop(rank[3], None)
            if state is not None:
                self.group.waiting -= 1
                return state

    def _lowest(self) -> tuple[Rank, bool]:
        """The lowest rank, stale or not, and whether it stands in line."""
        line, heap = self.line, self.heap
        in_line = not heap or (bool(line) and line[0] < heap[0])
        return (line[0] if in_line else heap[0]), in_line

    def _skip(self, in_line: bool) -> None:
        if in_line:
            self.line.popleft()
        else:
            heappop(self.heap)


class Group:
    """Requests that may share a forward: the residents of a batch key, and the queues that feed them.

    ``turn`` orders the rotation: the group with the lowest one is next. ``waiting`` counts the requests of its queues.

    ``heads`` is an index of the queues. Each has an entry there that is at or before its first request. What makes an
    entry stale (its request left, or the whole queue) does not touch the index: it is put right when it comes up.
    """

    __slots__ = ("heads", "key", "queues", "residents", "turn", "waiting")

    def __init__(self, key: str) -> None:
        self.key = key
        self.turn = 0
        self.waiting = 0
        self.residents: dict[str, RequestState] = {}
        self.queues: dict[str, Queue] = {}
        self.heads: list[tuple[Rank, Queue]] = []

    def add(self, queue: Queue) -> None:
        """``queue`` feeds this group from now on."""
        self.queues[queue.guess] = queue
        queue.group = self
        if queue.states:
            self.waiting += len(queue.states)
            self.enter(queue)

    def discard(self, queue: Queue) -> None:
        """``queue`` no longer does."""
        del self.queues[queue.guess]
        self.waiting -= len(queue.states)
        if not self.queues:
            self.heads.clear()

    def enter(self, queue: Queue) -> None:
        """Puts ``queue`` into the index by its first request."""
        heappush(self.heads, (queue.first(), queue))
        if len(self.heads) > 2 * len(self.queues) + SLACK:
            self.heads = [(filled.first(), filled) for filled in self.queues.values() if filled.states]
            heapify(self.heads)

    def first(self) -> Queue:
        """The queue whose first request is next of all; something must wait."""
        heads, queues = self.heads, self.queues
        if len(queues) == 1:
            return next(iter(queues.values()))
        while True:
            rank, queue = heads[0]
            if queues.get(queue.guess) is not queue or not queue.states:
                heappop(heads)
                continue
            head = queue.first()
            if head is rank:
                return queue
            heapreplace(heads, (head, queue))
