"""Euler steps: ``diffusers/schedulers/scheduling_euler_discrete.py``, ``step``, without churn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steploom.weave.noise.solvers.rows import RowStep, Tensors, begin, columns, fractional, over, plain, times

_ALLOWED = frozenset({"model_output", "timestep", "sample", "generator", "s_churn", "s_tmin", "s_tmax", "s_noise",
                      "return_dict"})  # fmt: skip


def step(own: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step; None with churn, which draws noise."""
    formula = _FORMULAS.get(own.config.prediction_type)
    if formula is None or not plain(arguments, _ALLOWED) or not fractional(arguments["timestep"]):
        return None
    if arguments.get("s_churn") or not own.is_scale_input_called:
        return None
    index = begin(own, arguments["timestep"])
    table = columns(own, _columns)

    def settled(results: list[torch.Tensor]) -> tuple[Any, ...]:
        own._step_index += 1
        return (results[0], results[1])

    tensors = [arguments["sample"], arguments["model_output"]]
    return RowStep(formula, tensors, [table[name][index] for name in ("sigma", "interval", "out", "skip")], settled)


def _columns(own: Any, sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    sigma = sigmas[:-1]
    return {
        "sigma": sigma,
        "interval": sigmas[1:] - sigma,
        "out": -sigma / (sigma**2 + 1) ** 0.5,
        "skip": sigma**2 + 1,
    }


def _epsilon(tensors: Tensors, coefficients: Tensors) -> list[torch.Tensor]:
    sample, output = tensors[0].float(), tensors[1]
    return _moved(sample, sample - times(coefficients[0], output), coefficients, output.dtype)


def _velocity(tensors: Tensors, coefficients: Tensors) -> list[torch.Tensor]:
    sample, output = tensors[0].float(), tensors[1]
    denoised = times(coefficients[2], output) + over(sample, coefficients[3])
    return _moved(sample, denoised, coefficients, output.dtype)


def _sample(tensors: Tensors, coefficients: Tensors) -> list[torch.Tensor]:
    return _moved(tensors[0].float(), tensors[1], coefficients, tensors[1].dtype)


def _moved(
    sample: torch.Tensor, denoised: torch.Tensor, coefficients: Tensors, dtype: torch.dtype
) -> list[torch.Tensor]:
    derivative = over(sample - denoised, coefficients[0])
    return [(sample + times(coefficients[1], derivative)).to(dtype), denoised]


_FORMULAS = {"epsilon": _epsilon, "v_prediction": _velocity, "sample": _sample, "original_sample": _sample}
