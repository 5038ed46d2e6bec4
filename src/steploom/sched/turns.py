"""Turns: whose turn it is among the users of a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from steploom.sched.ledger import Ledger

SLACK = 64
"""Entries of users that wait no more, whatever how many do."""

Q = TypeVar("Q")


class Turns(Generic[Q]):
    """Users that wait, each with a queue; who has had the least is first, by the ledger.

    A heap of what each had when it was entered: as that only grows while a user waits, an old entry comes up too early,
    and is put right then.
    """

    __slots__ = ("_came", "_heap", "_ledger", "_queues")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._queues: dict[str, tuple[int, Q]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._came = 0

    def __len__(self) -> int:
        return len(self._queues)

    def __iter__(self) -> Iterator[Q]:
        return (queue for _, queue in self._queues.values())

    def get(self, user: str) -> Q | None:
        """The user's queue, if it has one."""
        found = self._queues.get(user)
        return None if found is None else found[1]

    def add(self, user: str, queue: Q) -> Q:
        """The user waits from now on; among equals who came first is first."""
        self._came += 1
        self._queues[user] = self._came, queue
        heappush(self._heap, (self._ledger[user], self._came, user))
        if len(self._heap) > 2 * len(self._queues) + SLACK:
            self.reorder()
        return queue

    def remove(self, user: str) -> None:
        """It waits no more."""
        del self._queues[user]

    def first(self, waits: Callable[[Q], bool] | None = None) -> Q | None:
        """The queue of the user whose turn it is; None if nobody waits.

        Args:
            waits: Whether something waits in a queue after all; else its user is dropped.
        """
        while self._heap:
            had, came, user = self._heap[0]
            number, queue = self._queues.get(user, (0, None))
            if number != came or queue is None:
                heappop(self._heap)
            elif had != self._ledger[user]:
                heappop(self._heap)
                heappush(self._heap, (self._ledger[user], came, user))
            elif waits is None or waits(queue):
                return queue
            else:
                heappop(self._heap)
                del self._queues[user]
        return None

    def reorder(self) -> None:
        """What users have had was counted anew."""
        self._heap = [(self._ledger[user], came, user) for user, (came, _) in self._queues.items()]
        heapify(self._heap)
