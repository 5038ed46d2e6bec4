"""What a module computes in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn


def compute_dtype(module: Any) -> torch.dtype | None:
    """The dtype that most of a module's floating weights have; None if it has none.

    By their number, so that one buffer, or the norms, of another dtype do not decide.
    """
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None
