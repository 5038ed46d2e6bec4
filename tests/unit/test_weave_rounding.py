"""What rounding may make of a result."""

from __future__ import annotations

import torch
from torch import nn

from steploom.weave.differences import LOOSE, far_apart
from steploom.weave.precision import compute_dtype

WIDTH = 32


def test_the_tolerance_goes_by_what_most_weights_are() -> None:
    """A model in bfloat16 hands out float32; one in float32 with a buffer in bfloat16 is as exact as any."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    model.register_buffer("places", torch.ones(99, dtype=torch.bfloat16))
    assert compute_dtype(model) == torch.float32
    model.to(torch.bfloat16)
    model.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(9))
    assert compute_dtype(model) == torch.bfloat16
    assert compute_dtype(nn.ReLU()) is None
    one = torch.ones(4)
    assert far_apart(one, one * 1.01, LOOSE, torch.bfloat16) is None
    assert far_apart(one, one * 1.01, LOOSE, torch.float32) is not None
    assert far_apart(one, one * 1.01, LOOSE, None) is not None
    assert far_apart(one.bfloat16(), one.bfloat16() * 1.01, LOOSE, torch.float32) is None
