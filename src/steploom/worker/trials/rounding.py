"""Rounding: how far a pipeline alone moves when its networks round otherwise.

A forward of other rows is a matrix product of another shape, for which the libraries choose other kernels, and others
on each processor: so its results differ in the last bits. Most pipelines end within 1e-5 of where they would have been.
Some do not: tiny random models whose steps amplify, and cascades that round to bytes or to the nearest code in between.
What those give together can be told from what they give alone only as well as that from itself.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steploom.weave import untyped
from steploom.weave.calls import Leaf, flatten, unflatten
from steploom.weave.verifying.precision import compute_dtype

LAST_BITS = 8.0
"""Rounding of a network's output, in units of the last place of what it computes in, which may be less exact than what
it hands out: what other kernels were seen to differ by, and more."""


@contextmanager
def rounded_otherwise(pipeline: Any) -> Generator[None]:
    """Within it the outputs of the pipeline's networks differ in their last bits. No random state of others is used."""
    generator = torch.Generator().manual_seed(0)

    def hook(module: torch.nn.Module, _arguments: Any, output: Any) -> Any:
        leaves: list[Leaf] = []
        structure = flatten(output, leaves)
        eps = torch.finfo(compute_dtype(module) or torch.float64).eps
        return unflatten(structure, [_rounded(leaf, generator, eps) for leaf in leaves])

    with ExitStack() as hooks:
        for module in untyped.modules_of(pipeline).values():
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _rounded(leaf: Leaf, generator: torch.Generator, eps: float) -> Leaf:
    if isinstance(leaf, list):
        return [_otherwise(tensor, generator, eps) for tensor in leaf]
    return _otherwise(leaf, generator, eps)


def _otherwise(leaf: torch.Tensor, generator: torch.Generator, eps: float) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
    return leaf * (1 + LAST_BITS * max(eps, torch.finfo(leaf.dtype).eps) * noise)
