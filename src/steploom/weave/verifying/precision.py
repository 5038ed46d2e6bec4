"""Forwards in another precision, by which rounding is told from crosstalk: a leak stays in float64, rounding vanishes.

A mixture of experts sends other numbers of tokens to an expert in other company, so its matrix products have other
shapes and round otherwise; where two experts are nearly equal, one token may even go to the other one. A module is run
in float64 operation by operation, without a second copy of its weights.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip
_PLAIN = (torch.Tensor, nn.Parameter)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "_scaled_mm")
"""Operations whose rounding goes by the shapes of what they are given; attentions and what is not torch's own too."""

_COMPARING = (
    nn.functional.scaled_dot_product_attention, nn.functional.rms_norm, nn.functional.layer_norm,
    nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d,
    nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d,
)  # fmt: skip
_LAST_BITS = 2.0


class NotExact(RuntimeError):
    """Something that a module does cannot be done in float64."""


@contextmanager
def exactly(module: Any) -> Generator[None]:
    """Within it all that is computed is computed in float64, uncompiled; what the module remembers of it is dropped.

    Raises:
        NotExact: By what is run within it: it writes into a tensor of a lower precision, or reads its bits.
    """
    with ExitStack() as stack:
        stack.callback(_restored, _attributes(module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Alike())
        stack.enter_context(_Wide())
        yield


@contextmanager
def rounded_otherwise(seed: int) -> Generator[None]:
    """Within it matrix products, convolutions and attentions differ in their last bits, by chance."""
    with torch.compiler.set_stance("force_eager"), _Shaken(seed):
        yield


def compute_dtype(module: Any) -> torch.dtype | None:
    """The dtype that most of a module's floating weights have; None if it has none.

    By their number, so that one buffer, or the norms, of another dtype do not decide.
    """
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def _attributes(module: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each part's attributes and each of its tables, with what they hold: caches of positions must not stay wide."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in parts:
        tables = [value for value in part.__dict__.values() if type(value) in (dict, OrderedDict)]
        found += [(table, table.copy()) for table in (part.__dict__, *tables)]
    return found


def _restored(attributes: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for now, before in attributes:
        if list(map(id, now.values())) != list(map(id, before.values())):  # tables of hooks are other threads', too
            now.clear()
            now.update(before)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if type(value) in _PLAIN and value.dtype in _WIDE:
        return value.detach().to(_WIDE[value.dtype])
    return value


class _Alike(TorchFunctionMode):
    """Attention, norms and convolutions compare the dtypes of what they are given before they come to any operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COMPARING:
            args, kwargs = pytree.tree_map(_widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Wide(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.view.dtype:
            raise NotExact("the bits of a tensor are read as another dtype")
        if func.is_view:  # of a weight, too: only what is computed with is worth a copy
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._refuse_narrow(func, args, kwargs)
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        return pytree.tree_map(_widened, func(*args, **kwargs))

    def _refuse_narrow(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = kwargs.get(argument.name) if i >= len(args) else args[i]
            if any(isinstance(t, torch.Tensor) and t.dtype in _WIDE for t in pytree.tree_leaves(written)):
                raise NotExact(f"{func} writes into a tensor that is not float64")


def _grouped(
    rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """The product of each group of rows with its own weights, which torch knows for half precision only."""
    if ends is None or bias is not None or rows.ndim != 2 or weights.ndim != 3:
        raise NotExact("a grouped matrix product of other dimensions")
    result = rows.new_zeros(len(rows), weights.shape[-1])
    start = 0
    for end, weight in zip(ends.tolist(), weights, strict=True):
        result[start:end] = rows[start:end] @ weight
        start = end
    return result


class _Shaken(TorchDispatchMode):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._noise = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        own = func.namespace not in ("aten", "prims", "prim")
        if (own or name in _PRODUCTS or name.startswith("_scaled_dot_product")) and not func._schema.is_mutable:
            return pytree.tree_map(self._otherwise, result)
        return result

    def _otherwise(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not value.is_floating_point() or not value.numel():
            return value
        noise = torch.randn(value.shape, generator=self._noise).to(value.device, value.dtype)
        scale = value.abs() + value.abs().mean()  # a sum near zero is as inexact as the others
        return value + _LAST_BITS * torch.finfo(value.dtype).eps * scale * noise
