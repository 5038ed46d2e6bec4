"""Hall: who is let in next among groups of which nobody is resident: by class, by user, and by the policy's rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush

from steploom.sched.lines import Order, Rank
from steploom.sched.state import RequestState
from steploom.sched.turns import Turns

SLACK = 64
"""Entries of requests that do not wait any more that the hall may have, whatever its size."""

Entry = tuple[bool, Rank, int, str]
"""Whether late, rank, arrival, run id."""


class Hall:
    """Who is let in next among groups without residents: the user that has had the least of the best class.

    Of each such group there is an entry for each user and class: of whoever came last, or became its first. An entry
    whose request left, or whose group has residents, is dropped when it comes up, or when such are the majority; one
    whose class or rank has changed is entered anew.

    Args:
        order: The policy's.
        find: The request of a run id and its class, if it waits in such a group.
    """

    def __init__(self, order: Order, find: Callable[[str], tuple[RequestState, int] | None]) -> None:
        self._order = order
        self._find = find
        self._classes: dict[int, Turns[list[Entry]]] = {}
        self._newest: dict[str, tuple[int, Entry]] = {}  # Of each request: its class, and its entry there.
        self._size = 0

    def __len__(self) -> int:
        """Entries, also of those that do not wait any more."""
        return self._size

    def enter(self, state: RequestState, number: int, now: float) -> None:
        """``state``, of that class, waits in a group without residents."""
        entry = (self._late(state, now), self._order.rank(state), state.arrival, state.run_id)
        if self._newest.get(state.run_id) == (number, entry):
            return
        self._newest[state.run_id] = (number, entry)
        turns = self._classes.get(number)
        if turns is None:
            turns = self._classes[number] = Turns(self._order.ledger)
        entries = turns.get(state.user)
        if entries is None:
            entries = turns.add(state.user, [])
        heappush(entries, entry)
        self._size += 1

    def first(self, now: float) -> str | None:
        """The run id of the request whose turn it is: of the best class, then by user, then by rank."""
        while self._classes:
            number = min(self._classes)
            turns = self._classes[number]
            entries = turns.first(partial(self._waits, number, now))
            if entries is None:
                del self._classes[number]
            elif number == min(self._classes):  # Else one that came up has risen above it.
                return entries[0][3]
        return None

    def _waits(self, number: int, now: float, entries: list[Entry]) -> bool:
        """Whether a request of that class waits here; it comes up."""
        while entries:
            late, rank, _, run = entry = entries[0]
            found = self._find(run)
            if found is not None:
                state, current = found
                if (current, self._late(state, now), self._order.rank(state)) == (number, late, rank):
                    return True
            heappop(entries)
            self._size -= 1
            if self._newest.get(run) == (number, entry):
                del self._newest[run]
            if found is not None:
                self.enter(*found, now)
        return False

    def tidy(self, waiting: int) -> None:
        """Drops what is not needed, if it is the majority. ``waiting``: how many wait."""
        if self._size <= 2 * waiting + SLACK:
            return
        newest, find = self._newest, self._find
        self._newest = {run: place for run, place in newest.items() if find(run) is not None}
        self._size = 0
        for number, turns in self._classes.items():
            for entries in turns:
                entries[:] = {entry for entry in entries if self._newest.get(entry[3]) == (number, entry)}
                heapify(entries)
                self._size += len(entries)

    def reorder(self) -> None:
        """What users have had is counted anew."""
        for turns in self._classes.values():
            turns.reorder()

    def clear(self) -> None:
        """Nobody waits."""
        self._classes.clear()
        self._newest.clear()
        self._size = 0

    def _late(self, state: RequestState, now: float) -> bool:
        return not state.attempt and self._order.late(state, now)
