"""Noise schedulers: each request has a copy, observed so that every ``step`` ends a step of its program.

The copy's ``__class__`` is swapped for a subclass: a wrapper object would break pipelines that ``deepcopy`` their
scheduler inside ``__call__`` (LTX2, Cosmos3, Kandinsky 6). Only the observed object itself ends steps, not its copies.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch


class StepEnd:
    """One end of an observed ``step``.

    Attributes:
        latents: After the step ``[rows, ...]``.
        timestep: As the pipeline gave it.
        sigma: Noise level after the step; None where the noise scheduler has none.
        result: What ``step`` returned.
        given: The keyword arguments of ``step``.
    """

    __slots__ = ("_estimate", "given", "latents", "result", "sigma", "timestep")

    def __init__(
        self,
        latents: Any,
        timestep: Any,
        sigma: float | None,
        estimate: Callable[[], Any],
        result: Any = None,
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.latents = latents
        self.timestep = timestep
        self.sigma = sigma
        self.result = result
        self.given = given
        self._estimate = estimate

    def estimate(self) -> Any:
        """The estimate of the finished latents (x0) that the step started from ``[rows, ...]``."""
        return self._estimate()


class _Observation:
    """Who hears of a copy's steps, and from which of its own step indices the last one began."""

    def __init__(self, observer: Callable[[StepEnd], None]) -> None:
        self.observer = observer
        self.began: int | None = None

    def begins(self, index: int | None) -> bool:
        """Whether a step that begins at ``index`` is a new one.

        Cosmos takes each step twice, and MultiDiffusion once per view: then the first is the one that is told.
        """
        new, self.began = index is None or index != self.began, index
        return new


_observers: dict[int, _Observation] = {}


def observe(noise_scheduler: Any, observer: Callable[[StepEnd], None]) -> Any:
    """A copy of ``noise_scheduler`` whose every ``step`` is told to ``observer``, until :func:`forget`."""
    own = copy.deepcopy(noise_scheduler)
    if hasattr(own, "step"):
        own.__class__ = _observed_class(type(own))
        _observers[id(own)] = _Observation(observer)
    return own


def forget(noise_scheduler: Any) -> None:
    """Ends the observation of a copy."""
    _observers.pop(id(noise_scheduler), None)


def total_steps(noise_scheduler: Any, announced: int | None) -> int | None:
    """How many ``step`` calls the noise scheduler expects, if it knows.

    Args:
        noise_scheduler: After ``set_timesteps``.
        announced: Steps as the user counts them, where the pipeline has said so: fewer than the noise scheduler's under
            ``strength``. PNDM and samplers of second order call ``step`` more often than that.
    """
    timesteps = getattr(noise_scheduler, "timesteps", None)
    if timesteps is None:
        return announced
    steps = getattr(noise_scheduler, "num_inference_steps", None)
    order = getattr(noise_scheduler, "order", 1)
    if (
        announced is None
        or not isinstance(steps, int)
        or (order == 1 and not hasattr(noise_scheduler, "plms_timesteps"))
    ):
        return len(timesteps) if announced is None else announced
    return len(timesteps) - (steps - announced) * order


@functools.cache
def _observed_class(cls: type) -> type:
    """A subclass of ``cls`` with the same name, whose ``step`` reports."""
    original: Any = cls.step  # pyright: ignore[reportAttributeAccessIssue]
    find = _finder(original)

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = _observers.get(id(self))
        observer = seen.observer if seen is not None and seen.begins(getattr(self, "step_index", None)) else None
        before = _sigma(self) if observer is not None else None
        model_output, timestep, sample = find(args, kwargs)
        result = original(self, *args, **kwargs)
        if observer is not None:
            latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
            own = None if isinstance(result, tuple) else getattr(result, "pred_original_sample", None)
            estimate = functools.partial(_estimate, self, own, before, model_output, timestep, sample)
            observer(StepEnd(latents, timestep, _sigma(self), estimate, result, kwargs))
        return result

    members = {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _ObservedMeta(cls.__name__, (cls,), members)


class _ObservedMeta(type):
    """Makes an observed class equal to the one that it stands for: Bria asks ``type(scheduler) != ...``."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[1]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


def _finder(step: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """Finds model output, timestep and sample among arguments: their order is not the same everywhere (CogVideoX)."""
    names = [name for name in inspect.signature(step).parameters if name != "self"]
    wanted = [(name, names.index(name) if name in names else -1) for name in ("model_output", "timestep", "sample")]

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return [args[place] if 0 <= place < len(args) else kwargs.get(name) for name, place in wanted]

    return find


def _sigma(noise_scheduler: Any) -> float | None:
    """The noise level at the scheduler's current step index, where it keeps sigmas on the host."""
    sigmas, index = getattr(noise_scheduler, "sigmas", None), getattr(noise_scheduler, "step_index", None)
    if sigmas is None or not isinstance(sigmas, torch.Tensor) or sigmas.device.type != "cpu":
        return None
    if index is None:
        index = getattr(noise_scheduler, "begin_index", None) or 0
    return float(sigmas[min(int(index), len(sigmas) - 1)])


def _estimate(scheduler: Any, own: Any, sigma: float | None, output: Any, timestep: Any, sample: Any) -> Any:
    """x0 from a model output, by what the noise scheduler says that its model predicts.

    Flow matching: ``x0 = x - sigma * v`` (``scheduling_flow_match_euler_discrete.py``). With sigmas:
    ``x0 = x - sigma * eps`` (``scheduling_euler_discrete.py``). With alphas: ``x0 = (x - sqrt(1 - a) eps) / sqrt(a)``
    (``scheduling_ddim.py``, equation 12 of https://arxiv.org/abs/2010.02502).
    """
    if own is not None:
        return own
    kind = scheduler.config.get("prediction_type", "epsilon")
    flow = (
        "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction" or scheduler.config.get("use_flow_sigmas")
    )
    if kind == "sample":
        return output
    if flow:
        return sample if sigma is None else sample - sigma * output
    if sigma is not None and not hasattr(scheduler, "alpha_t"):
        scale = sigma**2 + 1
        return sample - sigma * output if kind == "epsilon" else sample / scale - output * (sigma / scale**0.5)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return sample
    alpha = alphas[int(timestep)].to(sample.device)
    if kind == "v_prediction":
        return alpha.sqrt() * sample - (1 - alpha).sqrt() * output
    return (sample - (1 - alpha).sqrt() * output) / alpha.sqrt()
