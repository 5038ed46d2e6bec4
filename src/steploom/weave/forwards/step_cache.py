"""Step caching: a request's denoiser calls are answered from its own last ones while their outputs hardly change.

The rule is that of EasyCache (https://arxiv.org/abs/2507.02860, "Less is Enough: Training-Free Video Diffusion
Acceleration via Runtime-Adaptive Caching"; ``easycache_forward`` in
https://github.com/H-EmbodVis/EasyCache/blob/main/EasyCache4HunyuanVideo/easycache_sample_video.py). With ``x`` the
denoiser's input, ``y`` its output, ``c`` the last step that was computed and ``b`` the one computed before it:

- How fast the output follows the input: ``k = |y_c - y_b| / |x_c - x_b|``.
- What a step would change: ``k |x_n - x_(n-1)| / |y_c|``. It is skipped while the sum of these, over the steps since
  ``c``, stays below the threshold. A step that is computed starts the sum anew.
- A skipped step's output: ``x_n + (y_c - x_c)``, the cached *transformation*.

``|.|`` is the mean of absolute values. Upstream takes it over all rows; here each row has its own, and the largest
counts: no row is skipped because its neighbours in the same request hardly change. Other requests take no part in it.

A step is skipped as a whole. Its first denoiser call decides for those that follow (with and without the prompt, or a
ControlNet before its denoiser), as upstream decides once for both branches of guidance: an old half beside a new one
would be magnified by the guidance scale. Each call of the step has its own cached transformation, and ``|y_c - y_b| /
|y_c|`` is the largest of all of them; of a ControlNet's none, since its output goes nowhere but into the denoiser.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from steploom.step_caches import StepCaching
from steploom.weave.calls import Leaf, ModuleCall, flatten, has_opaque, pattern, unflatten
from steploom.weave.order import is_denoiser

if TYPE_CHECKING:
    from steploom.weave.program import Program

log = logging.getLogger(__name__)

MOST_CALLS = 8
"""Denoiser calls of one step whose transformations are kept; a request with more in a step skips none."""

_LEAST_WARM_UP = 2
"""Steps that have to be computed before ``k`` is known."""

_SAMPLES = ("hidden_states", "sample", "x", "latents")
"""What denoisers call their input, where it is given by name."""


class Rule:
    """When a step may be skipped, without tensors.

    Args:
        threshold: What the changes of skipped steps may add up to.
        warm_up: The share of all steps that are computed first.

    Attributes:
        error: The changes of the steps that were skipped since one was computed.
    """

    def __init__(self, threshold: float, warm_up: float) -> None:
        self.threshold = threshold
        self.warm_up = warm_up
        self.error = 0.0

    def allows(self, done: int, total: int) -> bool:
        """Whether the step after ``done`` of ``total`` may be skipped at all: not in the warm-up, and not the last."""
        return max(_LEAST_WARM_UP, math.ceil(self.warm_up * total)) <= done < total - 1

    def skips(self, change: float) -> bool:
        """Whether a step is skipped that would change the output by this share; nan is computed."""
        self.error += change
        if self.error < self.threshold:
            return True
        self.error = 0.0
        return False


class StepCache:
    """The step cache of one request. It belongs to its program, which drops it when it ends.

    It keeps copies of the denoiser's input in the last step and in the last computed one, and for each denoiser call of
    a step its output and its transformation. On CUDA it waits for the device once in each step that might be skipped:
    whether it is, is decided on the host.

    Args:
        caching: What the request asked for.
    """

    def __init__(self, caching: StepCaching, settle: Callable[[bool], bool] = bool) -> None:
        self._settle = settle
        self._rule = Rule(caching.threshold, caching.warm_up)
        self._step = 0
        self._calls = 0
        self._computed = False
        self._skipping = False
        self._keeping = False
        self._key: Hashable = None
        self._restart(0, None)

    def _restart(self, step: int, first: Hashable) -> None:
        """Knows nothing: the steps from ``step`` on, which begin with the call ``first``, warm up anew."""
        self._first, self._since = first, step
        self._places: dict[Hashable, _Place] = {}
        self._input: list[torch.Tensor] = []
        self._anchor: list[torch.Tensor] = []
        self._moved: torch.Tensor | None = None
        self._rate: torch.Tensor | None = None
        self._rule.error = 0.0

    def answer(self, program: Program) -> bool:
        """Whether the call that ``program`` has stopped at is answered here, and need not run."""
        try:
            return self._answer(program)
        except Exception as fault:  # noqa: BLE001 - the request's boundary: whatever a tensor raises, it skips no more
            _give_up(program, fault)
            return False

    def _answer(self, program: Program) -> bool:
        call, self._key = program.call, None
        if call is None or call.language is not None or not is_denoiser(call.target.name):
            return False
        key = (self._calls, call.target.name, call.target.method, pattern(call.structure))
        self._calls += 1
        if self._calls == 1:
            self._skipping = self._begin_step(program, call, key)
        place = self._places.get(key)
        if not self._skipping or place is None or not place.fits(call):
            self._computed, self._key = True, key
            return False
        program.answer = place.answer(call)
        return True

    def step_ended(self, program: Program) -> None:
        """The program has ended a step."""
        program.skipped_steps += self._calls > 0 and not self._computed
        self._step, self._calls, self._computed, self._skipping = program.steps, 0, False, False

    def _begin_step(self, program: Program, call: ModuleCall, key: Hashable) -> bool:
        """Whether the step that begins with ``call`` is skipped."""
        total, step = program.watcher.total_steps, program.steps
        self._keeping = total is not None and step < total - 1
        place = self._places.get(key)
        if not self._keeping or key != self._first or place is None or not place.fits(call):
            self._restart(step, key if self._keeping else None)
            return False
        before, self._input = self._input, _copies(place.tracked(call))
        change = self._change(_distances(self._input, before))
        assert total is not None
        if not self._rule.allows(step - self._since, total - self._since) or change is None:
            self._rule.error = 0.0
        elif self._settle(self._rule.skips(float(change))):
            return True
        self._moved, self._anchor, self._rate = _distances(self._input, self._anchor), self._input, None
        return False

    def _change(self, moved: torch.Tensor) -> torch.Tensor | None:
        """What this step is expected to change, as a share of the output; None if nobody knows."""
        then = self._moved
        if then is None or self._rate is None:
            return None
        ratios = _ratios(moved, then).amax()
        return torch.where(then.amax() > 0, self._rate * ratios, torch.nan)

    def learn(self, program: Program) -> None:
        """Keeps what the call that ``program`` waits for was answered with, if it was computed."""
        try:
            self._learn(program)
        except Exception as fault:  # noqa: BLE001 - as above
            _give_up(program, fault)

    def _learn(self, program: Program) -> None:
        call, key = program.call, self._key
        if not self._keeping or key is None or call is None or program.answer is None:
            return
        self._key = None
        if self._calls > MOST_CALLS or has_opaque(call.structure):
            self._keeping = False  # a cache that the module writes would miss a step
            self._restart(program.steps, None)
            return
        place = self._places.get(key)
        kept = self._places[key] = _Place(call, program.answer)
        if key == self._first and not self._anchor:
            self._input = self._anchor = _copies(kept.tracked(call))
        if not call.target.name.rpartition(".")[2].startswith("controlnet"):
            rate = kept.rate(place)
            self._rate = rate if self._rate is None else torch.maximum(self._rate, rate)  # nan stays


def _give_up(program: Program, fault: Exception) -> None:
    log.warning("request %s skips no more steps: %s: %s", program.name, type(fault).__name__, fault)
    program.step_cache = None


class _Place:
    """What is kept of one denoiser call of a step.

    Args:
        call: As it was computed last.
        result: What came of it.
    """

    def __init__(self, call: ModuleCall, result: Any) -> None:
        leaves: list[Leaf] = []
        self._structure = flatten(result, leaves)
        inputs = _inputs(call)
        self._usable = bool(inputs) and not has_opaque(self._structure)
        self._lengths = [len(leaf) if isinstance(leaf, list) else None for leaf in leaves]
        self._shapes = [tensor.shape for tensor in inputs]
        self._outputs = _copies(_tensors(leaves)) if self._usable else []
        self._sources = _sources(self._outputs, inputs)
        self._changes = [
            None if source is None else output - inputs[source]
            for output, source in zip(self._outputs, self._sources, strict=True)
        ]

    def fits(self, call: ModuleCall) -> bool:
        """Whether the transformation can be applied to ``call``: its tensors have the sizes that they had."""
        return self._usable and [tensor.shape for tensor in _inputs(call)] == self._shapes

    def tracked(self, call: ModuleCall) -> list[torch.Tensor]:
        """The inputs by whose change the output's is judged: the denoiser's own, and all that have an output alike."""
        inputs = _inputs(call)
        return [inputs[i] for i in sorted({0, *(s for s in self._sources if s is not None)})] if self._usable else []

    def answer(self, call: ModuleCall) -> Any:
        """The input plus the cached transformation; the last output where no input is like it. All tensors are new."""
        inputs = _inputs(call)
        made = [
            output.clone() if source is None or change is None else (inputs[source] + change).to(output.dtype)
            for output, source, change in zip(self._outputs, self._sources, self._changes, strict=True)
        ]
        rest = iter(made)
        leaves: list[Leaf] = [
            next(rest) if length is None else [next(rest).squeeze(0) for _ in range(length)] for length in self._lengths
        ]
        return unflatten(self._structure, leaves)

    def rate(self, before: _Place | None) -> torch.Tensor:
        """How much the outputs have changed since ``before``: the largest share of any row; nan if nobody knows."""
        mine = [output for output in self._outputs if output.is_floating_point()]
        others = [] if before is None else [output for output in before._outputs if output.is_floating_point()]
        if not mine or [tensor.shape for tensor in mine] != [tensor.shape for tensor in others]:
            return torch.tensor(torch.nan, device=mine[0].device if mine else None)
        return _ratios(_distances(mine, others), torch.cat([_sizes(output) for output in mine])).amax()


def _inputs(call: ModuleCall) -> list[torch.Tensor]:
    """The tensors of numbers with a fraction that a call was given, its denoiser's own input first."""
    found = [tensor for tensor in _tensors(call.leaves) if tensor.is_floating_point() and tensor.ndim > 1]
    own = next((call.argument(name) for name in _SAMPLES if isinstance(call.argument(name), torch.Tensor)), None)
    found.sort(key=lambda tensor: tensor is not own)  # stable: without a name it is the first
    return found


def _tensors(leaves: Sequence[Leaf]) -> list[torch.Tensor]:
    """All tensors of ``leaves``; those of a list, which has one for each row, with a dimension for the row."""
    return [t for leaf in leaves for t in ([one[None] for one in leaf] if isinstance(leaf, list) else [leaf])]


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies: pipelines update in place what they have."""
    return [tensor.clone() for tensor in tensors]


def _sources(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[int | None]:
    """For each output the input of the same shape, the first that no output before it has."""
    taken: list[int | None] = []
    for output in outputs:
        alike = (i for i, tensor in enumerate(inputs) if tensor.shape == output.shape and i not in taken)
        taken.append(next(alike, None) if output.is_floating_point() else None)
    return taken


def _sizes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of the absolute values of each row ``[rows]``, in float32."""
    return tensor.float().abs().reshape(tensor.shape[0] if tensor.ndim else 1, -1).mean(1)


def _distances(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far each row of each tensor is from its counterpart ``[rows of all tensors]``."""
    return torch.cat([_sizes(one.float() - other.float()) for one, other in zip(tensors, others, strict=True)])


def _ratios(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``part / whole``, where nothing of nothing is nothing."""
    return torch.where(part == 0, 0.0, part / whole)
