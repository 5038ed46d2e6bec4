"""What the solvers have in common: rows of several requests put together, one coefficient per row, results split."""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from steploom.weave.batching.wholes import Wholes

Tensors = Sequence[torch.Tensor]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Formula = Callable[[Tensors, Tensors], list[torch.Tensor]]
"""From tensors ``[rows, ...]`` and coefficients ``[rows, 1, ...]`` (float32) to results ``[rows, ...]``."""


class RowStep:
    """One request's step, before it is taken.

    Args:
        formula: What is computed; steps of one formula, shape and dtype are taken together.
        tensors: ``[rows, ...]`` each, of one shape and on one device.
        coefficients: One number each, for all rows of the request.
        settled: Takes the results, notes them in the noise scheduler, and makes what its ``step`` returns.
    """

    __slots__ = ("coefficients", "formula", "settled", "tensors")

    def __init__(
        self,
        formula: Formula,
        tensors: list[torch.Tensor],
        coefficients: list[float],
        settled: Callable[[list[torch.Tensor]], tuple[Any, ...]],
    ) -> None:
        self.formula = formula
        self.tensors = tensors
        self.coefficients = coefficients
        self.settled = settled

    @property
    def key(self) -> Hashable:
        """Equal for steps that can be taken together."""
        first = self.tensors[0]
        return (self.formula, first.shape[1:], first.device, *[tensor.dtype for tensor in self.tensors])


Solver = Callable[[Any, Mapping[str, Any]], RowStep | None]


def run(steps: Sequence[RowStep], wholes: Wholes) -> list[tuple[Any, ...]]:
    """Takes steps of equal keys; returns what each one's own ``step`` would have returned."""
    rows = [step.tensors[0].shape[0] for step in steps]
    tensors = [_joined(parts, wholes) for parts in zip(*[step.tensors for step in steps], strict=True)]
    first = tensors[0]
    by_row = [step.coefficients for step, count in zip(steps, rows, strict=True) for _ in range(count)]
    flat = array("f", itertools.chain.from_iterable(zip(*by_row, strict=True)))
    table = torch.frombuffer(flat, dtype=torch.float32)  # a third of what torch.tensor takes
    if first.device.type == "cuda":  # pinned, so that the host does not wait for the device
        table = table.pin_memory().to(first.device, non_blocking=True)
    coefficients = table.view(len(by_row[0]), -1, *[1] * (first.ndim - 1)).unbind()
    results: list[list[torch.Tensor]] = []
    for result in steps[0].formula(tensors, coefficients):
        results.append(list(result.split_with_sizes(rows)))
        wholes.note(results[-1], result)
    return [step.settled(list(parts)) for step, parts in zip(steps, zip(*results, strict=True), strict=True)]


def _joined(parts: Tensors, wholes: Wholes) -> torch.Tensor:
    whole = wholes.find(parts)
    return torch.cat(list(parts)) if whole is None else whole


def times(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``coefficient * tensor`` in the tensor's dtype, as diffusers' coefficients without dimensions have it."""
    if tensor.dtype is torch.float32:
        return coefficient * tensor
    return (_rounded(coefficient, tensor) * tensor.float()).to(tensor.dtype)


def over(tensor: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """``tensor / coefficient`` in the tensor's dtype."""
    if tensor.dtype is torch.float32:
        return tensor / coefficient
    return (tensor.float() / _rounded(coefficient, tensor)).to(tensor.dtype)


def _rounded(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU torch rounds a number to the other operand's dtype first; on CUDA one that is on the host is not."""
    return coefficient.to(tensor.dtype).float() if tensor.device.type == "cpu" else coefficient


def plain(arguments: Mapping[str, Any], allowed: frozenset[str]) -> bool:
    """Whether a step may be taken with others': it returns a tuple, and has no argument that does anything else."""
    sample, output = arguments.get("sample"), arguments.get("model_output")
    if arguments.get("return_dict", True) is not False:
        return False
    if not isinstance(sample, torch.Tensor) or not isinstance(output, torch.Tensor):
        return False
    shape = sample.shape
    if shape != output.shape or len(shape) < 2 or sample.device != output.device:
        return False
    if sample.dtype not in _FLOATS or output.dtype not in _FLOATS:
        return False
    return arguments.keys() <= allowed or all(name in allowed or value is None for name, value in arguments.items())


def fractional(timestep: Any) -> bool:
    """Whether a timestep is one of the scheduler's own, and not an index, which Euler schedulers refuse."""
    if isinstance(timestep, torch.Tensor):
        return timestep.is_floating_point() and timestep.numel() == 1
    return isinstance(timestep, float)


Columns = dict[str, list[float]]
Maker = Callable[[Any, torch.Tensor], dict[str, torch.Tensor]]
"""From a noise scheduler and its sigmas on the host to coefficients of all steps, by name."""

Table = tuple[torch.Tensor, int, dict[Maker, Columns], "weakref.ref[Any]"]

_tables: dict[int, Table] = {}
"""By identity of the noise scheduler, as long as it lives; weak keys would take three times as long to look up."""


def columns(noise_scheduler: Any, maker: Maker) -> Columns:
    """Coefficients of all steps, made once per schedule.

    Args:
        noise_scheduler: With ``sigmas [steps + 1]``.
        maker: Makes them.
    """
    sigmas = noise_scheduler.sigmas
    own = id(noise_scheduler)
    known = _tables.get(own)
    version = -1 if sigmas.is_inference() else sigmas._version
    if known is None or known[0] is not sigmas or known[1] != version:
        gone = weakref.ref(noise_scheduler, lambda _: _tables.pop(own, None))
        known = _tables[own] = (sigmas, version, {}, gone)
    found = known[2].get(maker)
    if found is None:
        made = maker(noise_scheduler, sigmas.cpu())
        found = known[2][maker] = {name: column.tolist() for name, column in made.items()}
    return found


def as_they_are(own: Any, sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sigmas themselves."""
    return {"sigmas": sigmas}


def begin(noise_scheduler: Any, timestep: Any) -> int:
    """The index of the step that begins, as the schedulers themselves find it."""
    if noise_scheduler.step_index is None:
        noise_scheduler._init_step_index(timestep)
    index: Any = noise_scheduler.step_index
    return int(index)
