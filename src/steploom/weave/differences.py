"""Differences between results of one module call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steploom.weave.calls import Leaf, flatten, values

LOOSE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Mean absolute difference over mean absolute value that alone and merged may show, by dtype."""

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The same that rounding may show where other lengths of the mates make a module pad otherwise."""


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


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves: list[Leaf] = []
    flatten(result, leaves)
    return [t for leaf in leaves for t in (leaf if isinstance(leaf, list) else [leaf])]


def _floating(one: Any, other: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return [(a, b) for a, b in pairs if a.is_floating_point() and a.numel()]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference, as a share of the mean absolute value of the first."""
    scale = one.float().abs().mean().item() or 1.0
    return (one.float() - other.float()).abs().mean().item() / scale


def _both_broken(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same NaN or Inf: a broken request is not a broken merge."""
    return not bool(one.isfinite().all()) and torch.equal(one.isfinite(), other.isfinite())
