"""Layouts: where each call's rows stand in a merged call.

Calls of equal row counts merge branch-major, ``[A0 B0 A1 B1]``. Calls of different row counts follow one another, *end
to end*: what looks at each row by itself does not mind. What cuts the batch by branches (perturbed-attention guidance)
wants them *by branch*, ``[A0 B0 B1, A1 B2 B3]``: here of two branches, in which A has one row each, and B two.

Where nobody knows how many branches there are, the greatest common divisor of the row counts serves: it is a multiple
of what all calls have in common, and the pieces of one branch stay together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Segment(NamedTuple):
    """Rows that stay together: of which call, from which of its rows on, how many."""

    call: int
    first: int
    rows: int


class Layout:
    """The places of the rows of calls.

    Args:
        rows: Of each call, equal ones side by side.
        branches: Of each call, if their rows are to stand by branch; 0: nobody knows how many. None: end to end.

    Attributes:
        rows: Likewise.
        total: Rows of all calls.
        mixed: Whether row counts differ.
        by_branch: The branches that were given, where they make a difference: not for equal rows. None: end to end.
    """

    def __init__(self, rows: Sequence[int], branches: int | None = None) -> None:
        self.rows = rows
        self.total = sum(rows)
        self.mixed = len(set(rows)) > 1
        several = branches is not None and self.mixed and (branches > 0 or math.gcd(*rows) > 1)
        self.by_branch = branches if several else None
        self._blocks = [(own, rows.count(own)) for own in dict.fromkeys(rows)]

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """The rows of the merged call, in order."""
        if self.by_branch is not None:
            pieces = self.by_branch or math.gcd(*self.rows)
            each = [own // pieces for own in self.rows]
            return [Segment(i, piece * own, own) for piece in range(pieces) for i, own in enumerate(each)]
        found: list[Segment] = []
        start = 0
        for rows, members in self._blocks:
            found += [Segment(i, row, 1) for row in range(rows) for i in range(start, start + members)]
            start += members
        return found

    def merged(self, parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """The calls' tensors as one, in which each row may have several entries."""
        if self.by_branch is not None:
            each = parts[0].shape[axis] // self.rows[0]
            return torch.cat([parts[i].narrow(axis, at * each, rows * each) for i, at, rows in self.segments], dim=axis)
        blocks: list[torch.Tensor] = []
        start = 0
        for rows, members in self._blocks:
            own = parts[start : start + members]
            start += members
            if members == 1:
                blocks.append(own[0])
                continue
            views = [part.unflatten(axis, (rows, -1)) for part in own]
            blocks.append(torch.stack(views, dim=axis + 1).flatten(axis, axis + 2))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)

    def split(self, tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
        """The inverse: each call's rows."""
        each = tensor.shape[axis] // self.total
        if self.by_branch is not None:
            pieces = tensor.split_with_sizes([rows * each for _, _, rows in self.segments], dim=axis)
            calls = len(self.rows)
            return [torch.cat(pieces[i::calls], dim=axis) for i in range(calls)]
        parts: list[torch.Tensor] = []
        start = 0
        for rows, members in self._blocks:
            size = rows * members * each
            block = tensor.narrow(axis, start, size)
            start += size
            if members == 1:
                parts.append(block)
                continue
            table = block.unflatten(axis, (rows, members, each))
            parts += [table.select(axis + 1, i).flatten(axis, axis + 1).contiguous() for i in range(members)]
        return parts

    def merged_lists(self, lists: Sequence[list[Any]]) -> list[Any]:
        """The entries of all calls' lists, which have one or more for each row."""
        found: list[Any] = []
        for i, at, rows in self.segments:
            each = len(lists[i]) // self.rows[i]
            found += lists[i][at * each : (at + rows) * each]
        return found

    def split_list(self, entries: list[Any]) -> list[list[Any]]:
        """The inverse: each call's entries."""
        each = len(entries) // self.total
        parts: list[list[Any]] = [[] for _ in self.rows]
        start = 0
        for i, _, rows in self.segments:
            parts[i] += entries[start : start + rows * each]
            start += rows * each
        return parts

    def of_rows(self, values: Sequence[Any]) -> list[Any]:
        """What each row has of what each call has."""
        return [values[i] for i, _, rows in self.segments for _ in range(rows)]
