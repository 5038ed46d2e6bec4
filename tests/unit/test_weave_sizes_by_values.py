"""A forward whose sizes go by the timesteps or the masks of its rows has other bits in other company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.axes import Axes
from steploom.weave.batching.fixed import sized_by_values
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall

WIDTH, TOKENS, REQUESTS = 32, 12, 3


class Target:
    """Stands for a shared module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = self.invoke = module
        self.name, self.key, self.method = "transformer", "own", "forward"
        self.group, self.ragged, self.language, self.adapted = "own", None, None, None


class Staged(nn.Module):
    """One expert for rows of late timesteps, another one for those of early ones."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.above = above

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out, early = x.clone(), t > self.above
        for rows, expert in ((early, self.first), (~early, self.second)):
            out[rows] = expert(x[rows])
        return out


class Wide(nn.Module):
    """One product."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)


class Packed(Wide):
    """Without the tokens that are masked."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[mask] = self.wide(x[mask])
        return out


class OneByOne(Wide):
    """The same, each row by itself."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for row, own, of_row in zip(x, mask, out, strict=True):
            of_row[own] = self.wide(row[own])
        return out


class Masked(Wide):
    """All tokens, whatever the mask says, and whatever the time is."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.wide(x) * other.reshape(1, -1).expand(len(x), -1).float().mean(1)[:, None, None]


class Picky(Wide):
    """Takes no timestep that is far from 500."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if (t - 500).abs().max() > 300:
            raise ValueError(f"there is no such timestep: {t}")
        return self.wide(x)


PADDED = torch.arange(TOKENS)[None] < TOKENS // 2


@pytest.mark.parametrize(
    ("build", "other", "found"),
    [
        (lambda: Staged(40.0), torch.tensor([1000.0]), True),
        (lambda: Staged(500), torch.tensor([1000]), True),
        (lambda: Staged(900.0), torch.tensor([300.0]), True),
        (lambda: Staged(0.9), torch.tensor([0.4], dtype=torch.bfloat16), True),
        (lambda: Staged(0.1), torch.tensor([1.0]), True),
        (Packed, PADDED, True),
        (Packed, PADDED | True, True),
        (Packed, ~PADDED, True),
        (OneByOne, PADDED, False),
        (Masked, PADDED, False),
        (Masked, torch.tensor([1000.0]), False),
        (Picky, torch.tensor([500.0]), False),
    ],
)
def test_sizes_that_go_by_timesteps_and_masks_are_found(
    build: Callable[[], nn.Module], other: torch.Tensor, found: bool
) -> None:
    """Whatever they are in the call that comes first."""
    target: Any = Target(build().requires_grad_(False))
    own = ModuleCall(target, (torch.randn(1, TOKENS, WIDTH), other), {})
    faults: list[Exception] = []
    assert sized_by_values(MergedCall([own] * REQUESTS, Axes((0, 0), (0,))), faults.append) is found
    assert not faults
