"""Tallies: histograms that cost a tick next to nothing. One thread writes and reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
"""Bounds of durations: from a step of a small model to ten minutes."""

REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Bounds of how many requests share a forward."""


class Tally:
    """A histogram.

    Args:
        bounds: Upper bounds of its buckets, each inclusive, growing.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts ``value`` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound as text, and how many values are not above it."""
        found: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*map(float, self._bounds), float("inf")), self._counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else str(bound), below))
        return found
