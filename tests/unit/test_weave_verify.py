"""The check of a merge: no crosstalk passes, however faint; a module that pads to its longest row does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steploom.weave.axes import Axes, Seen, compare
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.verifying.verify import check

Module = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Target:
    """Stands for a shared module."""

    def __init__(self, module: Module) -> None:
        self.invoke = module
        self.name, self.key, self.method, self.module = "transformer", "own", "forward", self
        self.group, self.ragged, self.language, self.adapted = "own", None, None, None


def verdict(module: Module, *lengths: int) -> str | None:
    """What the check says of calls of a module with masks of these lengths."""
    noise = torch.Generator().manual_seed(0)
    target: Any = Target(module)
    masks = [(torch.arange(12) < length).long().unsqueeze(0) for length in lengths]
    calls = [ModuleCall(target, (torch.randn(1, 12, generator=noise), mask), {}) for mask in masks]
    merged = MergedCall(calls, Axes((0, 0), (0,)))
    return check(merged, merged.run())


def pads(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Its rounding depends on the longest row, as that of an attention over as many places does."""
    return x * mask.sum(1, keepdim=True) * (1 + 2e-7 * mask.sum(1).max())


def test_padding_to_the_longest_row_is_not_crosstalk() -> None:
    assert verdict(pads, 3, 9, 5) is None


def reads_row_zero(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x * mask[:1].sum(1, keepdim=True)


def takes_the_longest(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-4 * mask.sum(1).max())


def leaks_like_rounding(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return pads(x, mask) + 1e-6 * x[:1]


def leaks_the_last_row(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return pads(x, mask) + 1e-6 * x[-1:]


def found(reason: str | None) -> bool:
    return reason is not None and ("mates" in reason or "differs" in reason)


@pytest.mark.parametrize(
    "module", [reads_row_zero, leaks_like_rounding, leaks_the_last_row], ids=lambda module: module.__name__
)
@pytest.mark.parametrize("lengths", [(3, 9, 5), (12, 12), (5, 5)], ids=str)
def test_crosstalk_is_found(module: Module, lengths: tuple[int, ...]) -> None:
    assert found(verdict(module, *lengths))


def test_a_length_that_changes_more_than_rounding_is_crosstalk() -> None:
    assert found(verdict(takes_the_longest, 3, 9, 5))


def test_a_list_of_one_result_per_row_is_learned_from_one_row() -> None:
    """Z-Image without guidance: one entry in, one entry out."""
    one, two = Seen((((4, 1),),), (((4, 1),),)), Seen((((4, 1), (4, 1)),), (((4, 1), (4, 1)),))
    assert compare(one, two, [[torch.ones(4, 1)]]) == Axes(("rows",), ("rows",))


def branchwise(strength: float, branches: int = 2) -> Module:
    """Perturbs its last branch, each row by itself, as perturbed-attention guidance does."""

    def module(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        *others, last = x.chunk(branches)
        return torch.cat([*others, last + strength * last.roll(1, 1)])

    return module


def images(module: Module, *counts: int, branches: int | None, dtype: torch.dtype = torch.float32) -> MergedCall:
    """Calls with two rows for each image."""
    noise = torch.Generator().manual_seed(0)
    target: Any = Target(module)
    rows = [2 * count for count in counts]
    calls = [
        ModuleCall(target, (torch.randn(n, 12, generator=noise).to(dtype), torch.ones(n, 12).long()), {}) for n in rows
    ]
    return MergedCall(calls, Axes((0, 0), (0,)), branches=branches)


def said(module: Module, *counts: int, branches: int | None, dtype: torch.dtype = torch.float32) -> str | None:
    """What the check says of them."""
    merged = images(module, *counts, branches=branches, dtype=dtype)
    return check(merged, merged.run())


@pytest.mark.parametrize(
    ("dtype", "strength"), [(torch.float32, 1e-5), (torch.float32, 0.3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_a_module_that_takes_its_rows_by_branch(dtype: torch.dtype, strength: float) -> None:
    """Also where it perturbs them by less than two runs in half precision may differ."""
    module = branchwise(strength)
    reason = said(module, 1, 2, 3, branches=None, dtype=dtype)
    assert reason is not None
    assert "by branch" in reason
    assert said(module, 1, 2, 3, branches=2, dtype=dtype) is None
    assert said(module, 1, 2, 3, branches=0, dtype=dtype) is None
    assert said(module, 2, 2, branches=None, dtype=dtype) is None


def test_a_wrong_number_of_branches_is_found() -> None:
    assert said(branchwise(0.3), 1, 2, branches=1) is not None


def rounds_by_place(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As a kernel may whose work is cut into tiles."""
    if x.dtype == torch.float64:
        raise RuntimeError("knows no float64")
    return x * (1 + 2e-7 * (torch.arange(len(x)) % 3).unsqueeze(1))


def test_rounding_that_goes_by_places_is_no_fault() -> None:
    assert said(rounds_by_place, 1, 2, 3, branches=None) is None


def rounds_one_place_in_float32(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The fifth place of six, which is another call's by branch."""
    scale = torch.ones(len(x), 1, dtype=x.dtype)
    if len(x) == 6 and x.dtype == torch.float32:
        scale[4] += 3e-6
    return x * scale


def test_what_float64_does_not_have_is_no_matter_of_places() -> None:
    assert said(rounds_one_place_in_float32, 1, 2, branches=None) is None
