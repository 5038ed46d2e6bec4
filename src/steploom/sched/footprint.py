"""Footprint: the bytes of one batch key's requests and ticks, learned from what the workers measure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from steploom.protocol import RunnerOutput

SAMPLES = 15
"""Measurements of each kind that are kept."""


class Footprint:
    """What the requests of a batch key keep, and what their ticks take on top of it.

    Attributes:
        held: Bytes that a request keeps between steps, by its rows: the median.
        step: Bytes that a tick takes at its peak beyond what is kept, by its rows: the median.
        chores: The same, as a whole, of ticks with text encoders or VAEs: the most of the last ones, since what takes
            most of all is a VAE, and many such ticks have only encoders.
    """

    def __init__(self) -> None:
        self.held = self.step = self.chores = 0.0
        self._held: deque[float] = deque(maxlen=SAMPLES)
        self._steps: deque[float] = deque(maxlen=SAMPLES)
        self._chores: deque[float] = deque(maxlen=SAMPLES)

    def observe_request(self, held: int, rows: int) -> None:
        """A request that brings so many rows keeps so many bytes."""
        if held:
            self._held.append(held / max(1, rows))
            self.held = median(self._held)

    def observe_tick(self, result: RunnerOutput, rows: int) -> None:
        """A tick of so many rows, without warm-up; where nobody measures its bytes it says nothing."""
        if not result.peak_bytes:
            return
        if result.chores_s:
            self._chores.append(result.peak_bytes)
            self.chores = max(self._chores)
        else:
            self._steps.append(result.peak_bytes / rows)
            self.step = median(self._steps)

    def state(self) -> list[list[float]]:
        """What another process needs to go on."""
        return [list(self._held), list(self._steps), list(self._chores)]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Footprint:
        """The one whose :meth:`state` is in there under ``"bytes"``, if there is any."""
        footprint = cls()
        held, steps, chores = state.get("bytes", ([], [], []))
        footprint._held.extend(map(float, held))
        footprint._steps.extend(map(float, steps))
        footprint._chores.extend(map(float, chores))
        footprint.held = median(footprint._held or [0.0])
        footprint.step = median(footprint._steps or [0.0])
        footprint.chores = max(footprint._chores, default=0.0)
        return footprint
