"""What a module would compute now: changes when its weights or its structure do. Compared, never interpreted."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import nn

from steploom.weave.modules.shared import version
from steploom.weave.modules.structure import ModuleStructure

_SAMPLES = 8
"""Entries read of each parameter."""


def fingerprint(module: nn.Module, structure: ModuleStructure) -> Hashable:
    """Equal for one module at two times between which nothing was done that changes its results.

    Updates through ``.data`` (a fused adapter, a moving average) leave no trace in a tensor's version, so a few entries
    of each parameter are looked at: an update of one entry alone may pass unseen.

    Args:
        module: The module.
        structure: Watches it.
    """
    return version(module), _samples(module), structure.now()


def _samples(module: nn.Module) -> Hashable:
    """A few entries of each parameter and buffer, evenly spread, the first among them."""
    found: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in _plain(module):
        step = max(1, (tensor.numel() - 1) // (_SAMPLES - 1))
        some = torch.as_strided(tensor, ((tensor.numel() - 1) // step + 1,), (step,))
        found.setdefault((tensor.dtype, tensor.device), []).append(some)
    return tuple(
        (dtype, device, torch.cat(parts).detach().cpu().view(torch.uint8).numpy().tobytes())
        for (dtype, device), parts in found.items()
    )


def _plain(module: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that can be sliced: no quantized ones, which are classes of their own and not written in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta
        if plain and tensor.numel() and tensor.is_contiguous():
            yield tensor
