"""What deaths of workers say about requests, kept apart from the scheduler: whom it must blame, whom it must not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping


class Suspicions:
    """By name: how often a request was in a tick of a worker that died, and how far it had come by then."""

    def __init__(self, max_retries: int) -> None:
        self.max_retries = max_retries
        self.strikes: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.beyond: dict[str, int] = {}
        self.mates: dict[str, int] = {}  # how many others may run with it until it is acquitted
        self.acquitted: set[str] = set()  # beyond where its worker died, so far as it was not suspected again
        self.by_chance = False  # whether a worker has died, or lost something, that nobody is to blame for

    def spent(self, name: str) -> bool:
        """Whether it was replayed with all others as often as it may be."""
        return self.strikes[name] > self.max_retries

    def apart(self, name: str) -> bool:
        """Whether it may not run with just anybody."""
        return self.spent(name) and name not in self.acquitted

    def death(self, flying: Mapping[str, int], steps: Mapping[str, int], *, ghosts: bool) -> set[str]:
        """A worker has died with these in its ticks, each in so many; those that fail."""
        for name, ticks in flying.items():
            self.strikes[name] += 1
            self.acquitted.discard(name)
            self.beyond[name] = max(self.beyond.get(name, 0), steps[name] + ticks)
        spent = {name for name in flying if self.spent(name)}
        for name in spent:
            self.mates[name] = (len(spent) + 1) // 2 - 1
        return spent if len(flying) == 1 and not ghosts else set()

    def lost(self, name: str) -> bool:
        """The worker has lost it, and lives; whether it fails."""
        self.losses[name] += 1
        return self.losses[name] > self.max_retries

    def looks(self, steps: Mapping[str, int]) -> None:
        """Sees how far those that run have come."""
        self.acquitted.update(name for name, done in steps.items() if done >= self.beyond.get(name, 0))

    def joins(self, name: str, others: Collection[str]) -> None:
        """Checks who may join whom: a spent request only its cell; others only who is acquitted."""
        if self.apart(name):
            assert all(self.spent(other) for other in others)
            assert len(others) <= self.mates.get(name, 0)
        else:
            assert not any(self.apart(other) for other in others)

    def blames(self, name: str, *, killer: bool) -> None:
        """Checks who fails: the one that kills, unless a worker has died by chance."""
        assert killer or self.by_chance, f"{name} has done nothing"

    def forget(self, name: str) -> None:
        """It has its outcome; another one may have its name."""
        self.acquitted.discard(name)
        for book in (self.strikes, self.losses, self.beyond, self.mates):
            book.pop(name, None)
