"""The operations of a forward, by the sizes of what they are given: a mixture of experts has others in other company.

A kernel is chosen by the sizes of its operands. Where these go by what a forward's rows hold, how many tokens go to an
expert say, so do the bits of each of its rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_GROUPED = "_grouped_mm"
"""Many products in one, whose sizes are the values of one of its operands."""

_MOVES = frozenset((
    "cat", "stack", "split", "index", "index_select", "index_put", "index_put_", "gather", "masked_select",
    "masked_fill", "masked_fill_", "where", "clone", "copy_", "_to_copy", "constant_pad_nd", "repeat", "flip", "roll",
    "repeat_interleave", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "fill_", "zero_", "mul_",
))  # fmt: skip
"""What puts numbers elsewhere, and rounds none: a text's padding, by its mask (HunyuanImage). And a product in place: a
text is dropped by a factor of zero, in the rows that a mask picks (GLM-Image)."""

Operations = list[tuple[Any, ...]]


def includes(operations: Operations, others: Operations, share: int) -> bool:
    """Whether each of ``others`` is among the operations, one in so many times.

    So are those of a module that computes its rows one by one (Mochi), for a row that is one in so many.
    """
    there = Counter(operations)
    return all(there[operation] * share >= number for operation, number in Counter(others).items())


@contextmanager
def recorded() -> Generator[Operations]:
    """Lists what is run within it, uncompiled: each operation that may round, and the sizes of its operands."""
    mode = _Recorder()
    with torch.compiler.set_stance("force_eager"), mode:
        yield mode.operations


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        operands = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        rounds = any(one.is_floating_point() or one.is_complex() for one in operands)
        if rounds and not func.is_view and (func.namespace != "aten" or name not in _MOVES):
            sizes: list[Any] = [one.shape for one in operands]
            if name == _GROUPED:
                sizes += [one.tolist() for one in operands if one.dtype == torch.int32]
            self.operations.append((func, *map(tuple, sizes)))
        return func(*args, **kwargs)
