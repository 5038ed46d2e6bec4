"""Verify once: every kind of merge is checked the first time, so that an unknown pipeline is at worst slow.

Three checks. Rows of different counts end to end against the same by branch: catches what cuts its batch by branches.
Rows alone against merged, loosely: catches gross errors. The same row count with the mates replaced, bit for bit:
catches any crosstalk, such as a module that reads an argument of row 0 only. The mates' rows differ in *every* merged
argument, so one event settles the kind.

Not every other bit is an error. Bits that change only with the mates' masks and lengths, and by no more than rounding,
are padding. A mixture of experts rounds otherwise in any other company, and a token may go to another expert for it:
whether a difference is nothing but that, :class:`~steploom.weave.verifying.differences.Rounding` tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from steploom.weave.axes import SHARED
from steploom.weave.batching.merge_keys import is_scalar
from steploom.weave.batching.merging import MergedCall, Unsplittable
from steploom.weave.calls import Leaf
from steploom.weave.lora.blend import BASE
from steploom.weave.machine_faults import is_out_of_memory
from steploom.weave.verifying.differences import (
    LOOSE,
    ROUNDING,
    Rounding,
    far_apart,
    largest_difference,
    nearer,
    plain_values,
    same_values,
)

_COMPARED = 4
_NOISE_FACTOR = 4.0

TRIES = 3
"""Merged calls of a kind that fail, and none of their calls by itself: then it is the merging that fails."""

FORGIVEN = 100
"""After so many that did not fail, those that did are not held against their kind: something else had happened."""


class Verdicts:
    """Which kinds of merge were verified, and which failed and why; for the life of the process."""

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str | None] = {}
        self._names: dict[Hashable, str] = {}
        self._doubts: dict[Hashable, tuple[int, int]] = {}  # Merged calls that failed, and how many have not since.

    def known(self, merged: MergedCall) -> bool:
        """Whether this kind needs no check any more."""
        return merged.kind in self._reasons

    def refusal(self, merged: MergedCall) -> str | None:
        """Why this kind is never merged; None if it may be, or is not known yet."""
        return self._reasons.get(merged.kind)

    def record(self, merged: MergedCall, reason: str | None) -> None:
        """Files a verdict; ``reason`` None is a pass. The first refusal stands."""
        if self._reasons.get(merged.kind) is None:
            self._reasons[merged.kind] = reason
            counts = ("mixed rows" if merged.mixed else "equal rows") + (", adapters" if merged.blended else "")
            counts += "" if merged.layout.by_branch is None else ", by branch"
            self._names[merged.kind] = f"{merged.target.name}.{merged.target.method}, {counts} #{len(self._names)}"

    def doubt(self, merged: MergedCall) -> bool:
        """The merged call failed, and none of its calls did by itself. Whether its kind has failed too often.

        Once is no reason to run alone for the life of the process: a device has a bad moment, too.
        """
        failures = self._doubts.get(merged.kind, (0, 0))[0] + 1
        self._doubts[merged.kind] = (failures, 0)
        return failures >= TRIES

    def passed(self, merged: MergedCall) -> None:
        """The merged call did not fail."""
        if self._doubts and (doubt := self._doubts.get(merged.kind)) is not None:
            failures, passed = doubt
            self._doubts[merged.kind] = (failures, passed + 1)
            if passed + 1 >= FORGIVEN:
                del self._doubts[merged.kind]

    def summary(self) -> dict[str, str]:
        """Kind by name: ``"verified"``, or why it is never merged."""
        return {self._names[kind]: reason or "verified" for kind, reason in self._reasons.items()}


def checked(merged: MergedCall, results: Sequence[Any], failed: Callable[[Exception], None]) -> str | None:
    """What :func:`check` finds; that it fails is such a reason, too, and ``failed`` is told.

    Raises:
        Exception: There was no memory for the check, in one of the ways that
            :func:`~steploom.weave.machine_faults.is_out_of_memory` knows: nothing was found out.
    """
    try:
        return check(merged, results)
    except Exception as fault:
        failed(fault)
        if is_out_of_memory(fault):
            raise
        return f"the check raised {type(fault).__name__}: {fault}"


def check(merged: MergedCall, results: Sequence[Any]) -> str | None:
    """Checks the first merge of a kind; the reason why it must not be merged, None if all is well.

    Args:
        merged: The merged call.
        results: What it gave, one per call.
    """
    rounding = Rounding(merged, results)
    picked = sorted({0, len(results) - 1, *_first_of_each_row_count(merged)})[:_COMPARED]
    if _misplaced(merged, results, picked, rounding):
        return "end to end, the rows do not stand by branch, as the module takes them"
    for i in picked:
        alone = merged.calls[i].run()
        reason = far_apart(alone, results[i], LOOSE, rounding.computed)
        if reason is not None and not rounding.explains(i, alone, merged.calls[i].run):
            return f"merged differs from alone: {reason}{_untold(rounding)}"
    for i in (0, len(results) - 1):
        reason = _crosstalk_or_fault(merged, results[i], i, merged.axes.pinned, rounding)
        if reason is not None:
            return f"rows depend on their mates: {reason}{_untold(rounding)}"
    return _leaking_adapters(merged, results, rounding) if merged.blended else None


def _untold(rounding: Rounding) -> str:
    if rounding.untold is None:
        return ""
    return f" (nobody can say whether that is rounding: it does not run in float64: {rounding.untold})"


def _misplaced(merged: MergedCall, results: Sequence[Any], picked: Sequence[int], rounding: Rounding) -> bool:
    """Whether rows end to end come out wrong, and by branch as they do alone.

    A module that cuts its batch by branches reads nobody else's rows, and in half precision it may differ from alone by
    less than the loose comparison allows: only another layout tells.
    """
    other = merged.placed_otherwise()
    if other is None:
        return False
    moved = other.run()

    def again(i: int) -> Any:
        return other.run(other.leaves)[i]

    return any(
        largest_difference(results[i], moved[i]) > 0
        and nearer(moved[i], results[i], merged.calls[i].run())
        and not rounding.explains(i, moved[i], functools.partial(again, i))
        for i in picked
    )


def _leaking_adapters(merged: MergedCall, results: Sequence[Any], rounding: Rounding) -> str | None:
    """Whether an adapter changes the rows of calls that do not have it, however weak it is."""
    for name in list(dict.fromkeys(merged.adapters))[:_COMPARED]:
        watched = merged.adapters.index(name)
        others = [own if own == name else BASE for own in merged.adapters]

        def again(watched: int = watched, others: list[str] = others) -> Any:
            return merged.run(merged.leaves, others)[watched]

        changed = again()
        if not _same(merged, results[watched], changed, watched) and not rounding.explains(watched, changed, again):
            return "an adapter reaches rows that do not have it"
    return None


def pins(merged: MergedCall, results: Sequence[Any]) -> frozenset[int]:
    """Arguments that are equal in all calls, and that must stay equal for rows not to depend on their mates.

    Position ids of which the module reads one row for all (FLUX.2), and zeros that mean "there is none" to a module
    that asks whether all of them are (HunyuanVideo 1.5). Empty if that does not explain what :func:`check` found.
    """
    if merged.input_axes != merged.axes.inputs or merged.calls[0].language is not None:  # padded: places have moved
        return frozenset()
    found = frozenset(
        i
        for i, axis in enumerate(merged.input_axes)
        if axis is not SHARED and _pinnable([own[i] for own in merged.leaves])
    )
    ends, rounding = (0, len(results) - 1), Rounding(merged, results)
    if found and all(_crosstalk_or_fault(merged, results[i], i, found, rounding) is None for i in ends):
        return found
    return frozenset()


def _pinnable(parts: Sequence[Leaf]) -> bool:
    first = parts[0]
    if isinstance(first, list) or first.ndim < 2:
        return False
    if first.is_floating_point() and bool(first.any()):
        return False
    return all(isinstance(own, torch.Tensor) and torch.equal(own, first) for own in parts)


def _crosstalk_or_fault(
    merged: MergedCall, expected: Any, watched: int, pinned: frozenset[int], rounding: Rounding
) -> str | None:
    try:
        return _crosstalk(merged, expected, watched, pinned, rounding)
    except (RuntimeError, ValueError, IndexError, TypeError, Unsplittable) as fault:
        if is_out_of_memory(fault):
            raise
        return f"{type(fault).__name__} with other mates: {fault}"


def _first_of_each_row_count(merged: MergedCall) -> list[int]:
    return [merged.rows.index(rows) for rows in dict.fromkeys(merged.rows)]


def _crosstalk(
    merged: MergedCall, expected: Any, watched: int, pinned: frozenset[int], rounding: Rounding
) -> str | None:
    """Whether the watched call's result changes when everybody else's arguments do.

    Integers may be masks and lengths: a module that pads to the longest row (Lumina 2) then rounds otherwise. So a
    difference that rounding explains is none if all bits stay with the mates' integers left as they are.
    """
    changed = _in_other_company(merged, watched, pinned)
    if not same_values(changed, expected):
        return f"{plain_values(expected)} became {plain_values(changed)}"
    if _same(merged, expected, changed, watched):
        return None
    counted = frozenset(j for j, leaf in enumerate(merged.leaves[watched]) if _holds_integers(leaf))
    if counted - pinned and far_apart(expected, changed, ROUNDING, rounding.computed) is None:
        kept = _in_other_company(merged, watched, pinned | counted)
        if same_values(kept, expected) and _same(merged, expected, kept, watched):
            return None
    if rounding.explains(watched, changed, lambda: _in_other_company(merged, watched, pinned)):
        return None
    return f"by up to {largest_difference(expected, changed):.1e}"


def _in_other_company(merged: MergedCall, watched: int, kept: frozenset[int]) -> Any:
    """The watched call's result with everybody else's arguments replaced but those in ``kept``."""
    return merged.run(other_company(merged, watched, kept))[watched]


def other_company(merged: MergedCall, watched: int, kept: frozenset[int]) -> list[list[Leaf]]:
    """Leaves for a merged call: the watched call's own, with everybody else's replaced but those in ``kept``."""
    noise = torch.Generator().manual_seed(0)
    return [
        own
        if i == watched
        else [
            leaf if j in kept else _replaced(leaf, axis, noise)
            for j, (leaf, axis) in enumerate(zip(own, merged.input_axes, strict=True))
        ]
        for i, own in enumerate(merged.leaves)
    ]


def other_numbers(merged: MergedCall) -> list[list[Leaf]]:
    """Leaves for a merged call of copies of one call: copies again, with other numbers in place of zeros, too."""
    noise = torch.Generator().manual_seed(0)
    own = [
        leaf if i in merged.axes.pinned or _holds_integers(leaf) else _replaced(leaf, axis, noise)
        for i, (leaf, axis) in enumerate(zip(merged.leaves[0], merged.input_axes, strict=True))
    ]
    return [own] * len(merged.calls)


def company_at_ends(merged: MergedCall, *, upper: bool) -> list[list[Leaf]]:
    """Leaves for a merged call of copies of one call: in the others vectors and masks are at an end of their range."""
    others = [
        leaf if i in merged.axes.pinned else _each(leaf, axis, functools.partial(_at_end, upper=upper))
        for i, (leaf, axis) in enumerate(zip(merged.leaves[0], merged.input_axes, strict=True))
    ]
    return [merged.leaves[0], *[others] * (len(merged.calls) - 1)]


def _holds_integers(leaf: Leaf) -> bool:
    tensors = leaf if isinstance(leaf, list) else [leaf]
    return bool(tensors) and not any(t.is_floating_point() or t.is_complex() for t in tensors)


def _same(merged: MergedCall, expected: Any, changed: Any, watched: int) -> bool:
    """Whether a call's results are the same, bit for bit, or as far as two runs of the identical merged call are.

    A kernel may differ from itself (atomics, split reductions): that is not crosstalk.
    """
    worst = largest_difference(expected, changed)
    return worst == 0.0 or worst <= _NOISE_FACTOR * largest_difference(expected, merged.run()[watched])


def _replaced(leaf: Leaf, axis: Any, noise: torch.Generator) -> Leaf:
    """Other contents of the same shape, within the range that the values had."""
    return _each(leaf, axis, functools.partial(_other, noise=noise))


def _each(leaf: Leaf, axis: Any, changed: Callable[[torch.Tensor], torch.Tensor]) -> Leaf:
    """The leaf with other contents, as far as these are of one row."""
    if isinstance(leaf, list):
        axes: tuple[int | None, ...] = axis if isinstance(axis, tuple) else (0,) * len(leaf)
        return [t if a is SHARED and t.ndim else changed(t) for t, a in zip(leaf, axes, strict=True)]
    return leaf if axis is SHARED and not is_scalar(leaf) else changed(leaf)


def _at_end(tensor: torch.Tensor, *, upper: bool) -> torch.Tensor:
    """A mask of all, or of the first one only; a timestep of 999 (of what is at most 1: 0.999), or nearly none.

    Integers may be places in a table, so they do not grow.
    """
    if tensor.dtype == torch.bool and tensor.ndim:
        return torch.ones_like(tensor) if upper else tensor & (tensor.cumsum(-1) == 1)
    if tensor.ndim >= 2 or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    if not tensor.is_floating_point():
        return tensor if upper else tensor.clamp(max=1)
    return torch.full_like(tensor, 0.999 if bool((tensor.abs() <= 1).all()) else 999) if upper else tensor * 1e-3


def _other(tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.roll(1, -1) if tensor.ndim else tensor
    factor = 0.55 + 0.4 * torch.rand(tensor.shape, generator=noise).to(tensor.device)
    if not tensor.is_floating_point():
        return tensor if tensor.is_complex() else (tensor * factor).floor().to(tensor.dtype)
    if tensor.ndim < 2:  # timesteps, sigmas, guidance scales: within their range
        return (tensor * factor).to(tensor.dtype)
    spread = tensor.float().abs().mean() + 0.01
    extra = torch.randn(tensor.shape, generator=noise).to(tensor.device) * spread
    return (tensor * factor + extra).to(tensor.dtype)
