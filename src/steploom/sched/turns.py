"""Turns: whose turn it is among users. Deficit round robin, in seconds."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

LEAST = 1e-3
"""Seconds of a quantum, at least."""


class Queue(Protocol):
    """What a user waits with: ``credit`` are the seconds that it may spend."""

    credit: float


Q = TypeVar("Q", bound=Queue)


class Turns(Generic[Q]):
    """Users that wait, each with a queue.

    M. Shreedhar and G. Varghese, "Efficient Fair Queuing using Deficit Round Robin", SIGCOMM 1995: a user whose turn it
    is may spend its credit; then it gets a quantum, and the next one has its turn. Who has nothing left to wait for
    loses its credit. The quantum is the dearest of the requests that were next in the last round, so that nearly each
    turn lets someone in, and one that was dear does not make turns longer for ever.

    Args:
        weights: Of users, where they differ.

    Attributes:
        queues: By user, the one whose turn it is first.
    """

    __slots__ = ("_dearest", "_left", "_quantum", "_weights", "queues")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.queues: OrderedDict[str, Q] = OrderedDict()
        self._weights = weights
        self._quantum = self._dearest = LEAST
        self._left = 0  # Turns of this round that are still to come.

    def first(self, cost: Callable[[Q], float | None]) -> Q | None:
        """The queue of the user whose turn it is; None if nobody waits. Asked again, it is the same one.

        Args:
            cost: Seconds of the next of a queue; None if nothing waits in it after all, which drops its user.
        """
        queues, passed = self.queues, 0
        while queues:
            if passed >= len(queues):
                self._skip_rounds(cost)
                passed = 0
            user, queue = next(iter(queues.items()))
            seconds = cost(queue)
            if seconds is None:
                del queues[user]
            elif len(queues) == 1 or seconds <= queue.credit:
                return queue
            else:
                queues.move_to_end(user)
                queue.credit += self._turn(seconds) * self._weights.get(user, 1.0)
                passed += 1
        return None

    def _turn(self, seconds: float) -> float:
        """The quantum of a turn whose user has a request of so many seconds next."""
        self._dearest = max(self._dearest, seconds)
        self._quantum = max(self._quantum, seconds)
        quantum, self._left = self._quantum, self._left - 1
        if self._left <= 0:
            self._quantum, self._dearest, self._left = self._dearest, LEAST, len(self.queues)
        return quantum

    def spend(self, queue: Q, seconds: float) -> None:
        """A request of the queue was let in."""
        queue.credit = max(0.0, queue.credit - seconds)

    def forget(self) -> None:
        """What requests were thought to take was wrong: nobody has credit that rests on it."""
        self._quantum = self._dearest = LEAST
        for queue in self.queues.values():
            queue.credit = 0.0

    def _skip_rounds(self, cost: Callable[[Q], float | None]) -> None:
        """Nobody could spend anything in a round: as many as it takes until somebody can, at once."""
        quanta = {user: self._quantum * self._weights.get(user, 1.0) for user in self.queues}
        short = {user: (cost(queue) or 0.0) - queue.credit for user, queue in self.queues.items()}
        rounds = min(math.ceil(short[user] / quanta[user]) for user in quanta) - 1
        for user, queue in self.queues.items():
            queue.credit += max(0, rounds) * quanta[user]
