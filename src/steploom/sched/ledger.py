"""Ledger: the seconds that users were let in for, from whatever group; so nobody has the places of all groups."""

from __future__ import annotations

from collections.abc import Mapping

LEAST = 1e-3
"""Seconds that are usual, at least."""


class Account:
    """What a user has had, how many of its requests wait, and what those that do not any more take by themselves."""

    __slots__ = ("gone_s", "seconds", "waiting")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waiting = 0
        self.gone_s = 0.0


class Ledger:
    """Of users of whom somebody waits, the seconds of requests that were let in, by weight. The least is next.

    Start-time fair queueing: P. Goyal, H. M. Vin and H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Who begins to
    wait begins where the one was who was let in last, so nobody saves up turns; who has nothing left to wait for is
    forgotten.

    Args:
        weights: Of users, where they differ.

    Attributes:
        accounts: Of users of whom somebody waits.
        gone: How many requests have waited and do not any more.
        gone_s: What these take by themselves.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.accounts: dict[str, Account] = {}
        self.gone, self.gone_s = 0, 0.0
        self._now = 0.0
        self._usual = LEAST

    def __getitem__(self, user: str) -> float:
        """What the user has had; nothing more than the last one, if none of its requests waits."""
        account = self.accounts.get(user)
        return self._now if account is None else account.seconds

    def came(self, user: str) -> None:
        """A request of the user waits from now on."""
        account = self.accounts.get(user)
        if account is None:
            account = self.accounts[user] = Account(self._now)
        account.waiting += 1

    def left(self, user: str, seconds: float) -> None:
        """One that takes so long by itself waits no more."""
        account = self.accounts[user]
        account.gone_s += seconds
        self.gone, self.gone_s = self.gone + 1, self.gone_s + seconds
        account.waiting -= 1
        if not account.waiting:
            del self.accounts[user]

    def let_in(self, user: str, seconds: float, *, sure: bool = True) -> float:
        """One of the user that waits is let in, and takes so long by itself: what is charged for it.

        If that is not ``sure`` it is no more than what is usual; the rest is charged once it is known.
        """
        account = self.accounts[user]
        self.left(user, seconds)
        if not sure and seconds > self._usual:
            seconds = self._usual
        usual = 0.9 * self._usual + 0.1 * seconds
        self._usual = usual if usual > LEAST else LEAST
        if account.seconds > self._now:
            self._now = account.seconds
        account.seconds += seconds / self.weights.get(user, 1.0)
        return seconds

    def charge(self, user: str, seconds: float) -> None:
        """One that was let in takes so much longer than it was charged for."""
        account = self.accounts.get(user)
        if account is not None:
            account.seconds += seconds / self.weights.get(user, 1.0)

    def forget(self) -> None:
        """What requests were thought to take was wrong: all are equal again."""
        self._now, self._usual = 0.0, LEAST
        for account in self.accounts.values():
            account.seconds = 0.0
