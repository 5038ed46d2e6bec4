"""Hall: the requests of groups without residents, by class, by user, and by the policy's rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush

from steploom.sched.lines import Order, Rank
from steploom.sched.state import RequestState
from steploom.sched.turns import Turns

SLACK = 64
"""Entries of requests that do not wait any more that the hall may have, whatever its size."""


class Seats:
    """A user's entries of one class: whether late, rank, arrival, run id."""

    __slots__ = ("credit", "heap")

    def __init__(self) -> None:
        self.heap: list[tuple[bool, Rank, int, str]] = []
        self.credit = 0.0


class Hall:
    """Who is let in next among groups of which nobody is resident: so users have turns between groups as within them.

    There is an entry of each such group: of whoever came last, or became its first. An entry whose request left, or
    whose group has residents, is dropped when it comes up, or when such are the majority; one whose class or rank has
    changed is entered anew.

    Args:
        order: The policy's.
        find: The request of a run id and its class, if it waits in such a group.
    """

    def __init__(self, order: Order, find: Callable[[str], tuple[RequestState, int] | None]) -> None:
        self._order = order
        self._find = find
        self._classes: dict[int, Turns[Seats]] = {}
        self._size = 0

    def __len__(self) -> int:
        """Entries, also of those that do not wait any more."""
        return self._size

    def enter(self, state: RequestState, number: int, now: float) -> None:
        """``state``, of that class, waits in a group without residents."""
        turns = self._classes.get(number)
        if turns is None:
            turns = self._classes[number] = Turns(self._order.weights)
        user = state.request.user or ""
        seats = turns.queues.get(user)
        if seats is None:
            seats = turns.queues[user] = Seats()
        heappush(seats.heap, (self._late(state, now), self._order.rank(state), state.arrival, state.run_id))
        self._size += 1

    def first(self, now: float) -> str | None:
        """The run id of the request whose turn it is: of the best class, then by user, then by rank."""
        while self._classes:
            number = min(self._classes)
            turns = self._classes[number]
            seats = turns.first(partial(self._cost, number, now))
            if seats is None:
                del self._classes[number]
            elif number == min(self._classes):  # else an entry that came up has risen above it
                return seats.heap[0][3]
        return None

    def let_in(self, state: RequestState, number: int) -> None:
        """``state``, of that class, was let in: its user is charged."""
        turns = self._classes.get(number)
        seats = None if turns is None else turns.queues.get(state.request.user or "")
        if turns is not None and seats is not None:
            turns.spend(seats, self._order.charge(state))

    def revalued(self, state: RequestState, number: int, now: float) -> None:
        """What ``state`` was thought to take was wrong."""
        if number in self._classes:
            self._classes[number].forget()
        self.enter(state, number, now)

    def tidy(self, waiting: int) -> None:
        """Drops the entries of those that wait no more, if they are the majority. ``waiting``: how many wait."""
        if self._size <= 2 * waiting + SLACK:
            return
        self._size = 0
        for number, turns in list(self._classes.items()):
            for user, seats in list(turns.queues.items()):
                seats.heap = [entry for entry in seats.heap if self._find(entry[3]) is not None]
                heapify(seats.heap)
                self._size += len(seats.heap)
                if not seats.heap:
                    del turns.queues[user]
            if not turns.queues:
                del self._classes[number]

    def clear(self) -> None:
        """Nobody waits."""
        self._classes.clear()
        self._size = 0

    def _cost(self, number: int, now: float, seats: Seats) -> float | None:
        """Seconds of the user's next request of that class; None if there is none."""
        heap = seats.heap
        while heap:
            late, rank, _, run = heap[0]
            found = self._find(run)
            if found is not None:
                state, current = found
                if (current, self._late(state, now), self._order.rank(state)) == (number, late, rank):
                    return self._order.charge(state)
            heappop(heap)
            self._size -= 1
            if found is not None:
                self.enter(*found, now)
        return None

    def _late(self, state: RequestState, now: float) -> bool:
        return not state.attempt and self._order.late(state, now)
