"""Lists with one entry (or some) for each row: merged and split as tensors are, branch-major."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Blocks = Sequence[tuple[int, int]]
"""Rows that a call brings, and how many calls bring as many, in the order of the merged rows."""


def merged(lists: Sequence[list[torch.Tensor]], blocks: Blocks) -> list[torch.Tensor]:
    """The entries of all calls, row by row of each block."""
    found: list[torch.Tensor] = []
    start = 0
    for rows, members in blocks:
        own = lists[start : start + members]
        start += members
        for row in range(rows):
            for entries in own:
                each = len(entries) // rows
                found += entries[row * each : (row + 1) * each]
    return found


def split(entries: list[Any], blocks: Blocks, each: int) -> list[Any]:
    """The inverse: each call's entries, ``each`` for a row."""
    parts: list[Any] = []
    start = 0
    for rows, members in blocks:
        block = entries[start : start + rows * members * each]
        start += len(block)
        for i in range(members):
            own: list[Any] = []
            for row in range(rows):
                at = (row * members + i) * each
                own += block[at : at + each]
            parts.append(own)
    return parts
