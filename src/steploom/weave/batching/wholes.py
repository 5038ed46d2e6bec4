"""Wholes: results that were split a moment ago. Rows that are put together again in the same order need no copy."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch


class Wholes:
    """Remembers the results of this tick and of the one before, as they were before they were split into views.

    The rows of a batch whose members do not change go from the forward to the noise scheduler's step and to the next
    forward as they are, unless the pipeline makes something else of them (classifier-free guidance does).
    """

    def __init__(self) -> None:
        self._now: dict[int, tuple[Sequence[torch.Tensor], torch.Tensor]] = {}
        self._before = self._now

    def begin_tick(self) -> None:
        """Forgets what is older than one tick: views keep all rows of their whole in memory."""
        self._before, self._now = self._now, {}

    def clear(self) -> None:
        """Forgets all."""
        self._now, self._before = {}, {}

    def note(self, parts: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
        """``parts`` are views of ``whole [rows, ...]``, in order, and all that there is of it."""
        self._now[id(parts[0])] = (parts, whole)

    def find(self, parts: Sequence[torch.Tensor | list[torch.Tensor]]) -> torch.Tensor | None:
        """``parts`` in one; None if they are not what one was split into."""
        first = id(parts[0])
        known = self._now.get(first) or self._before.get(first)
        if known is None or len(known[0]) != len(parts) or not all(map(operator.is_, known[0], parts)):
            return None
        return known[1]
