"""DPM-Solver++ steps of first and second order: ``diffusers/schedulers/scheduling_dpmsolver_multistep.py``, ``step``.

https://arxiv.org/abs/2211.01095, without noise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from steploom.weave.noise.solvers.conversion import PREDICTIONS, denoised, levels
from steploom.weave.noise.solvers.rows import Formula, RowStep, Tensors, begin, columns, plain, times

_ALLOWED = frozenset({"model_output", "timestep", "sample", "generator", "return_dict"})


def step(own: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step; None with noise, thresholding, learned variance, or a third order."""
    config = own.config
    if not plain(arguments, _ALLOWED) or config.algorithm_type != "dpmsolver++" or config.solver_order > 2:
        return None
    if config.thresholding or config.prediction_type not in PREDICTIONS or own.num_inference_steps is None:
        return None
    if config.variance_type in ("learned", "learned_range") or config.solver_type not in ("midpoint", "heun"):
        return None
    index = begin(own, arguments["timestep"])
    last = index == len(own.timesteps) - 1 and (
        config.euler_at_final
        or (config.lower_order_final and len(own.timesteps) < 15)
        or config.final_sigmas_type == "zero"
    )
    first_order = config.solver_order == 1 or own.lower_order_nums < 1 or last
    table = columns(own, _columns)
    tensors = [arguments["sample"], arguments["model_output"]]
    if not first_order:
        tensors.append(own.model_outputs[-1])
        if tensors[2] is None or tensors[2].shape != tensors[0].shape:
            return None
    formula = _formula_of(config.prediction_type, None if first_order else config.solver_type)
    return RowStep(formula, tensors, [table[name][index] for name in _COLUMNS], partial(_settled, own))


def _settled(own: Any, results: list[torch.Tensor]) -> tuple[Any, ...]:
    order = own.config.solver_order
    for i in range(order - 1):
        own.model_outputs[i] = own.model_outputs[i + 1]
    own.model_outputs[-1] = results[1]
    if own.lower_order_nums < order:
        own.lower_order_nums += 1
    own._step_index += 1
    return (results[0],)


_COLUMNS = ("alpha", "sigma", "level", "ratio", "first", "second", "heun")


def _columns(own: Any, sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    alpha, sigma, log_ratio = levels(own, sigmas)
    interval = log_ratio[1:] - log_ratio[:-1]
    before = torch.cat([interval[:1], interval[:-1]])
    decay = torch.exp(-interval) - 1.0
    return {
        "alpha": alpha[:-1],
        "sigma": sigma[:-1],
        "level": sigmas[:-1],
        "ratio": sigma[1:] / sigma[:-1],
        "first": alpha[1:] * decay,
        "second": 1.0 / (before / interval),
        "heun": alpha[1:] * (decay / interval + 1.0),
    }


@functools.cache
def _formula_of(prediction: str, second_order: str | None) -> Formula:
    return partial(_formula, prediction, second_order)


def _formula(prediction: str, second_order: str | None, tensors: Tensors, by: Tensors) -> list[torch.Tensor]:
    current = denoised(prediction, tensors[0], tensors[1], by)
    sample = tensors[0].float()
    moved = times(by[3], sample) - times(by[4], current)
    if second_order is not None:
        difference = times(by[5], current - tensors[2])
        if second_order == "midpoint":
            moved = moved - times(0.5 * by[4], difference)
        else:
            moved = moved + times(by[6], difference)
    return [moved.to(current.dtype), current]
