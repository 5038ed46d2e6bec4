"""Differences between results of one module call, and which of them rounding explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import Leaf, flatten, values
from steploom.weave.machine_faults import is_out_of_memory
from steploom.weave.verifying.precision import compute_dtype, exactly, rounded_otherwise

LOOSE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Mean absolute difference over mean absolute value that alone and merged may show, by dtype."""

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The same that rounding may show where it does not tip a choice, such as the experts of a token."""

_EXACT = 1e-10
"""Largest difference in float64 over mean absolute value that is no leak."""

_NEARER_FACTOR = 4.0
_SHAKES = 4
_SHAKEN_FACTOR = 4.0


def same_values(one: Any, other: Any) -> bool:
    """Whether the Python values in two results are equal."""
    return plain_values(one) == plain_values(other)


def plain_values(result: Any) -> list[Any]:
    """The Python values in a result, in order."""
    return values(flatten(result, []))


def far_apart(one: Any, other: Any, allowed: Mapping[torch.dtype, float], computed: torch.dtype | None) -> str | None:
    """How two results differ by more than is allowed; None if they do not.

    Args:
        one: A result.
        other: Another one.
        allowed: Mean absolute difference over mean absolute value, by dtype.
        computed: What the module computes in: a model in bfloat16 may hand out float32, rounded all the same.
    """
    if not same_values(one, other):
        return f"{plain_values(one)} and {plain_values(other)}"
    shapes = [[tuple(t.shape) for t in _tensors(result)] for result in (one, other)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    coarsest = allowed[torch.bfloat16]
    floor = 0.0 if computed is None else allowed.get(computed, coarsest)
    for a, b in _floating(one, other):
        difference = _distance(a, b)
        if not difference <= max(floor, allowed.get(a.dtype, coarsest)) and not _both_broken(a, b):
            return f"by {difference:.1e} of its scale"
    return None


def largest_difference(one: Any, other: Any) -> float:
    """Of any two entries of two results of the same shapes."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return max(((a.double() - b.double()).abs().nan_to_num().max().item() for a, b in pairs if a.numel()), default=0.0)


def nearer(one: Any, other: Any, expected: Any) -> bool:
    """Whether the first of two results is much nearer to what is expected than the second: more than rounding makes."""
    pairs = zip(_floating(expected, one), _floating(expected, other), strict=True)
    return any(
        _distance(*theirs) > max(_NEARER_FACTOR * _distance(*ours), torch.finfo(theirs[1].dtype).eps)
        for ours, theirs in pairs
    )


class Rounding:
    """Which differences that the check of a merged call has seen are rounding, and nothing else.

    Two things must hold. In float64 there is no difference: that excludes a leak, however faint. And as the module
    computes, the difference is not larger than what rounding makes of the same call: that excludes what the module does
    in its own dtype only.

    Args:
        merged: The merged call.
        results: What it gave, one per call.

    Attributes:
        computed: The dtype that the module computes in.
        untold: Why it cannot be said, if the module does not run in float64.
    """

    def __init__(self, merged: MergedCall, results: Sequence[Any]) -> None:
        self.computed = compute_dtype(merged.target.module)
        self.untold: str | None = None
        self._merged = merged
        self._results = results
        self._exact: list[Any] | None = None

    def explains(self, watched: int, found: Any, again: Callable[[], Any]) -> bool:
        """Whether rounding explains how a call's result differs from what the merged call gave.

        Args:
            watched: The call.
            found: Its result otherwise: alone, or in other company.
            again: Computes ``found`` once more.
        """
        given = self._results[watched]
        if self.untold is not None or not same_values(found, given):
            return False
        try:
            return self._equal_in_float64(watched, again) and self._no_larger_than_rounding(given, found, again)
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            self.untold = f"{type(fault).__name__}: {fault}"
            return False

    def _equal_in_float64(self, watched: int, again: Callable[[], Any]) -> bool:
        with exactly(self._merged.target.module):
            if self._exact is None:
                self._exact = self._merged.run(self._merged.leaves)  # given leaves: nothing of it is kept for later
            found = again()
        expected = self._exact[watched]
        pairs = zip(_tensors(expected), _tensors(found), strict=True)
        return same_values(expected, found) and all(
            a.shape == b.shape and largest_difference(a, b) <= _EXACT * _scale(a) for a, b in pairs
        )

    def _no_larger_than_rounding(self, given: Any, found: Any, again: Callable[[], Any]) -> bool:
        if far_apart(given, found, ROUNDING, self.computed) is None:
            return True
        seen = [_distance(a, b) for a, b in _floating(found, given)]
        usual = [0.0] * len(seen)
        for seed in range(_SHAKES):
            with rounded_otherwise(seed):
                shaken = again()
            usual = [
                max(before, _distance(a, b)) for before, (a, b) in zip(usual, _floating(found, shaken), strict=True)
            ]
        return all(far <= _SHAKEN_FACTOR * near for far, near in zip(seen, usual, strict=True))


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves: list[Leaf] = []
    flatten(result, leaves)
    return [t for leaf in leaves for t in (leaf if isinstance(leaf, list) else [leaf])]


def _floating(one: Any, other: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return [(a, b) for a, b in pairs if a.is_floating_point() and a.numel()]


def _scale(tensor: torch.Tensor) -> float:
    return (tensor.double().abs().mean().item() if tensor.numel() else 0.0) or 1.0


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference, as a share of the mean absolute value of the first."""
    scale = one.float().abs().mean().item() or 1.0
    return (one.float() - other.float()).abs().mean().item() / scale


def _both_broken(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same NaN or Inf: a broken request is not a broken merge."""
    return not bool(one.isfinite().all()) and torch.equal(one.isfinite(), other.isfinite())
