"""Noise schedulers: each request has a copy, observed so that every ``step`` ends a step of its program.

The copy's ``__class__`` is swapped for a subclass: a wrapper object would break pipelines that ``deepcopy`` their
scheduler inside ``__call__`` (LTX2, Cosmos3, Kandinsky 6). Only the observed object itself ends steps, not its copies.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch


class StepEnd:
    """One end of an observed ``step``.

    Attributes:
        latents: After the step ``[rows, ...]``.
        timestep: As the pipeline gave it.
        sigma: Noise level after the step; None where the noise scheduler has none.
    """

    __slots__ = ("_estimate", "latents", "sigma", "timestep")

    def __init__(self, latents: Any, timestep: Any, sigma: float | None, estimate: Callable[[], Any]) -> None:
        self.latents = latents
        self.timestep = timestep
        self.sigma = sigma
        self._estimate = estimate

    def estimate(self) -> Any:
        """The estimate of the finished latents (x0) that the step started from ``[rows, ...]``."""
        return self._estimate()


_observers: dict[int, Callable[[StepEnd], None]] = {}


def observe(noise_scheduler: Any, observer: Callable[[StepEnd], None]) -> Any:
    """A copy of ``noise_scheduler`` whose every ``step`` is told to ``observer``, until :func:`forget`."""
    own = copy.deepcopy(noise_scheduler)
    if hasattr(own, "step"):
        own.__class__ = _observed_class(type(own))
        _observers[id(own)] = observer
    return own


def forget(noise_scheduler: Any) -> None:
    """Ends the observation of a copy."""
    _observers.pop(id(noise_scheduler), None)


def total_steps(noise_scheduler: Any) -> int | None:
    """How many ``step`` calls the noise scheduler expects, if it knows."""
    timesteps = getattr(noise_scheduler, "timesteps", None)
    return None if timesteps is None else len(timesteps)


@functools.cache
def _observed_class(cls: type) -> type:
    """A subclass of ``cls`` with the same name, whose ``step`` reports."""

    @functools.wraps(cls.step)  # pyright: ignore[reportAttributeAccessIssue]
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        observer = _observers.get(id(self))
        before = _sigma(self) if observer is not None else None
        result = cls.step(self, model_output, timestep, sample, *args, **kwargs)  # pyright: ignore
        if observer is not None:
            latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
            own = None if isinstance(result, tuple) else getattr(result, "pred_original_sample", None)
            estimate = functools.partial(_estimate, self, own, before, model_output, timestep, sample)
            observer(StepEnd(latents, timestep, _sigma(self), estimate))
        return result

    return type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


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
