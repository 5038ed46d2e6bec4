"""Ledger: the seconds that users were let in for, from whatever group; so nobody has the places of all groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

LEAST = 1e-3
"""Seconds that are usual, at least."""


class Ledger:
    """Of users of whom somebody waits, the seconds of requests that were let in, by weight. The least is next.

    Start-time fair queueing: P. Goyal, H. M. Vin and H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Who begins to
    wait begins where the one was who was let in last, so nobody saves up turns; who has nothing left to wait for is
    forgotten.

    Args:
        weights: Of users, where they differ.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self._waiting: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._now = 0.0
        self._usual = LEAST

    def __getitem__(self, user: str) -> float:
        """What the user has had; nothing more than the last one, if none of its requests waits."""
        return self._seconds.get(user, self._now)

    def __len__(self) -> int:
        """Users of whom somebody waits."""
        return len(self._seconds)

    def came(self, user: str) -> None:
        """A request of the user waits from now on."""
        self._seconds.setdefault(user, self._now)
        self._waiting[user] += 1

    def left(self, user: str) -> None:
        """One waits no more."""
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user], self._seconds[user]

    def let_in(self, user: str, seconds: float, *, sure: bool = True) -> float:
        """One of the user that waits is let in, and takes so long by itself: what is charged for it.

        If that is not ``sure`` it is no more than what is usual; the rest is charged once it is known.
        """
        seconds = seconds if sure else min(seconds, self._usual)
        self._usual = max(LEAST, 0.9 * self._usual + 0.1 * seconds)
        self._now = max(self._now, self._seconds[user])
        self._seconds[user] += seconds / self.weights.get(user, 1.0)
        return seconds

    def charge(self, user: str, seconds: float) -> None:
        """One that was let in takes so much longer than it was charged for."""
        if user in self._seconds:
            self._seconds[user] += seconds / self.weights.get(user, 1.0)

    def forget(self) -> None:
        """What requests were thought to take was wrong: all are equal again."""
        self._now, self._usual = 0.0, LEAST
        self._seconds = dict.fromkeys(self._seconds, 0.0)
