"""Gaps: how long the device has nothing to do between two ticks, although there is something to do."""

from __future__ import annotations

import time


class Gaps:
    """Measures the time between two ticks, and what of it the worker waited for the engine, in seconds.

    Time in which no program is resident does not count: then nobody waits for the next tick. Nor do RPCs.

    Attributes:
        gap_s: Seconds between ticks since the start.
        idle_s: Of these, in which the worker waited for a message.
    """

    def __init__(self) -> None:
        self.gap_s = self.idle_s = 0.0
        self._since: float | None = None
        self._waited = 0.0

    def end(self, busy: bool) -> None:
        """A tick has ended; ``busy``: programs are resident."""
        self._since = time.perf_counter() if busy else None
        self._waited = 0.0

    def begin(self) -> tuple[float, float]:
        """A tick begins: its gap, and what of it was waiting."""
        if self._since is None:
            return 0.0, 0.0
        gap, idle = time.perf_counter() - self._since, self._waited
        self.gap_s += gap
        self.idle_s += idle
        return gap, idle

    def waited(self, since: float) -> None:
        """From ``since`` (``time.perf_counter``) to now there was no message."""
        self._waited += time.perf_counter() - since

    def called(self, since: float) -> None:
        """From ``since`` to now the worker answered an RPC."""
        if self._since is not None:
            self._since += time.perf_counter() - since
