"""How long the benchmark may take, and what was left out for that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Budget:
    """Seconds, shared by the cases that are still to come.

    Args:
        seconds: In all.
        clock: Of seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._ends = clock, clock(), clock() + seconds
        self._slice_ends = self._ends
        self.left_out: list[dict[str, Any]] = []

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds until this case should be done."""
        return min(self._ends, self._slice_ends) - self._clock()

    def share(self, cases: int) -> None:
        """This case may have its equal part of what is left for it and those after it."""
        self._slice_ends = self._clock() + max(0.0, self._ends - self._clock()) / max(1, cases)

    def allows(self, case: str, what: str, seconds: float) -> bool:
        """Whether that may be measured; if not, it is noted as left out."""
        if seconds <= self.left:
            return True
        self.leave_out(case, what, f"would take about {seconds:.1f} s of the {max(0.0, self.left):.1f} s left for it")
        return False

    def leave_out(self, case: str, what: str, why: str) -> None:
        """Notes that something was not measured."""
        self.left_out.append({"case": case, "what": what, "why": why})
        print(f"  {case}: left out {what}: {why}", flush=True)
