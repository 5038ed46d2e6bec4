"""Room: how many rows a merged forward of a text encoder or VAE may have, since more ran out of memory.

Of denoisers the scheduler learns that, which decides how many step together. Nobody decides how many encode or decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from steploom.weave.batching.fixed import sizes
from steploom.weave.batching.merging import MergedCall

RECOVERS = 32
"""Full forwards that have to go well before there may be more rows; twice as many if these, then, were too many."""
MOST_WAIT = 4096
"""Such forwards, at most."""
KEPT = 256
"""Sizes of calls of which a bound is kept."""


@dataclasses.dataclass
class _Bound:
    rows: float
    fine: int = 0
    wait: int = dataclasses.field(default_factory=lambda: RECOVERS)
    grown: bool = False


class Room:
    """The bounds, by module and by the sizes of a call."""

    def __init__(self) -> None:
        self._bounds: dict[Hashable, _Bound] = {}

    def has(self, merged: MergedCall) -> bool:
        """Whether a forward of so many rows may be tried."""
        bound = self._bounds.get(sizes(merged.calls[0])) if self._bounds else None
        return bound is None or merged.total_rows <= bound.rows

    def overflowed(self, merged: MergedCall) -> None:
        """There was no memory for it: forwards have half as many rows for a while."""
        kind = sizes(merged.calls[0])
        bound = self._bounds.pop(kind, None) or _Bound(merged.total_rows)
        bound.rows = max(1.0, min(bound.rows, merged.total_rows / 2))
        if bound.grown:
            bound.wait = min(2 * bound.wait, MOST_WAIT)
        bound.fine, bound.grown = 0, False
        if len(self._bounds) >= KEPT:
            del self._bounds[next(iter(self._bounds))]
        self._bounds[kind] = bound

    def sufficed(self, merged: MergedCall) -> None:
        """It went well. After enough of those that had more than half of what they may, there may be more."""
        bound = self._bounds.get(sizes(merged.calls[0])) if self._bounds else None
        if bound is None or 2 * merged.total_rows <= bound.rows:
            return
        bound.fine += 1
        if bound.fine >= bound.wait:
            bound.fine, bound.grown, bound.rows = 0, True, bound.rows * 1.25 + 1
