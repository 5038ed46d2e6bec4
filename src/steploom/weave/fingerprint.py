"""What a module would compute now: changes when its weights, hooks or methods do. Compared, never interpreted."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import nn

from steploom.weave.shared import version

_SAMPLES = 8
"""Entries read of each parameter."""


def fingerprint(module: nn.Module) -> Hashable:
    """Equal for one module at two times between which nothing was done that changes its results.

    Updates through ``.data`` (a fused adapter, a moving average) leave no trace in a tensor's version, so a few entries
    of each parameter are looked at: an update of one entry alone may pass unseen.
    """
    return version(module), _samples(module), tuple(_code(module))


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


def _code(module: nn.Module) -> Iterator[Hashable]:
    """Replaced ``forward`` methods, and hooks, of all submodules."""
    for part in module.modules():
        state = part.__dict__
        found = [state["forward"]] if "forward" in state else []
        for one in (*found, *state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values()):
            if not str(getattr(one, "__module__", "")).startswith("transformers."):  # installed by its first call
                yield _Same(one)


class _Same:
    """Equal if it is of the same object, which it keeps: an address alone may be another's later."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)
