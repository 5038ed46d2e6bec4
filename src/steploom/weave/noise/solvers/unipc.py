"""UniPC steps of first and second order: ``diffusers/schedulers/scheduling_unipc_multistep.py``, ``step``.

https://arxiv.org/abs/2302.04867: a corrector of the last step, then a predictor of the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from steploom.weave.noise.solvers.conversion import PREDICTIONS, denoised, levels
from steploom.weave.noise.solvers.rows import Formula, RowStep, Tensors, begin, columns, over, plain, times

_ALLOWED = frozenset({"model_output", "timestep", "sample", "return_dict"})


def step(own: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step; None with thresholding, a solver within the solver, a third order, noise prediction, or half floats."""
    config = own.config
    if not plain(arguments, _ALLOWED) or config.solver_order > 2 or own.solver_p or not own.predict_x0:
        return None
    if config.thresholding or config.prediction_type not in PREDICTIONS or own.num_inference_steps is None:
        return None
    if config.solver_type not in ("bh1", "bh2") or arguments["sample"].dtype is not torch.float32:
        return None
    index = begin(own, arguments["timestep"])
    left = len(own.timesteps) - index if config.lower_order_final else config.solver_order
    order = min(config.solver_order, left, own.lower_order_nums + 1)
    corrects = index > 0 and index - 1 not in own.disable_corrector and own.last_sample is not None
    corrected = own.this_order if corrects else 0
    table = columns(own, _columns)
    tensors = [arguments["sample"], arguments["model_output"]]
    needed = [own.last_sample, own.model_outputs[-1], own.model_outputs[0] if corrected == 2 else None]
    tensors += needed[: 2 + (corrected == 2)] if corrected else [own.model_outputs[-1]] if order == 2 else []
    if any(tensor is None or tensor.shape != tensors[0].shape for tensor in tensors):
        return None
    names = [*_LEVELS, *_PREDICTOR, *(_CORRECTOR[corrected] if corrected else ())]
    settled = partial(_settled, own, arguments["timestep"], order)
    return RowStep(
        _formula_of(config.prediction_type, corrected, order), tensors, [table[n][index] for n in names], settled
    )


def _settled(own: Any, timestep: Any, order: int, results: list[torch.Tensor]) -> tuple[Any, ...]:
    for i in range(own.config.solver_order - 1):
        own.model_outputs[i] = own.model_outputs[i + 1]
        own.timestep_list[i] = own.timestep_list[i + 1]
    own.model_outputs[-1], own.timestep_list[-1] = results[1], timestep
    own.this_order, own.last_sample = order, results[2]
    if own.lower_order_nums < own.config.solver_order:
        own.lower_order_nums += 1
    own._step_index += 1
    return (results[0],)


_LEVELS = ("alpha", "sigma", "level")
_PREDICTOR = ("p_ratio", "p_first", "p_scale", "p_reach")
_CORRECTOR = {1: ("c_ratio", "c_first", "c_scale"), 2: ("c_ratio", "c_first", "c_scale", "c_reach", "c_old", "c_new")}


def _columns(own: Any, sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the predictor takes from its step on, and the corrector from the step before it."""
    alpha, sigma, log_ratio = levels(own, sigmas)
    interval = log_ratio[1:] - log_ratio[:-1]
    before = torch.cat([interval[:1], interval[:-1]])
    reach = -before / interval  # r_k, of the step before
    decay = torch.expm1(-interval)
    scale = alpha[1:] * (-interval if own.config.solver_type == "bh1" else decay)
    ratio, first = sigma[1:] / sigma[:-1], alpha[1:] * decay
    old, new = _weights(own, interval, reach, decay)
    found = {"p_ratio": ratio, "p_first": first, "p_scale": scale, "p_reach": reach}
    later = {"c_ratio": ratio, "c_first": first, "c_scale": scale, "c_reach": reach, "c_old": old, "c_new": new}
    found |= {name: torch.cat([column[:1], column[:-1]]) for name, column in later.items()}
    return found | {"alpha": alpha[:-1], "sigma": sigma[:-1], "level": sigmas[:-1]}


def _weights(
    own: Any, interval: torch.Tensor, reach: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The corrector's weights of second order: ``R rho = b`` upstream."""
    hh = -interval
    base = hh if own.config.solver_type == "bh1" else decay
    phi = decay / hh - 1
    ones = torch.ones_like(reach)
    right = torch.stack([phi / base, (phi / hh - 0.5) * 2 / base], -1)
    left = torch.stack([torch.stack([ones, ones], -1), torch.stack([reach, ones], -1)], -2)
    # A step to sigma 0, or the first one, has none; they are not asked for.
    solvable = torch.isfinite(left).all(-1).all(-1) & torch.isfinite(right).all(-1) & (reach != 1)
    identity = torch.eye(2).expand_as(left)
    solved = torch.linalg.solve(torch.where(solvable[:, None, None], left, identity), right)
    return solved[:, 0], solved[:, 1]


@functools.cache
def _formula_of(prediction: str, corrected: int, order: int) -> Formula:
    return partial(_formula, prediction, corrected, order)


def _formula(prediction: str, corrected: int, order: int, tensors: Tensors, by: Tensors) -> list[torch.Tensor]:
    sample, current = tensors[0], denoised(prediction, tensors[0], tensors[1], by)
    previous = tensors[3] if corrected else tensors[2] if order == 2 else None
    if corrected:
        sample = _corrected(tensors[2:], current, by[7:])
    moved = times(by[3], sample) - times(by[4], current)
    if order == 2 and previous is not None:
        difference = over(previous - current, by[6])
        moved = moved - times(by[5], 0.5 * difference)
    return [moved.to(sample.dtype), current, sample]


def _corrected(tensors: Tensors, current: torch.Tensor, by: Tensors) -> torch.Tensor:
    """The sample that the step before should have come to, now that the model has been asked there."""
    last, previous = tensors[0], tensors[1]
    moved = times(by[0], last) - times(by[1], previous)
    if len(tensors) < 3:
        return (moved - times(by[2], 0.5 * (current - previous))).to(last.dtype)
    older = over(tensors[2] - previous, by[3])
    return (moved - times(by[2], times(by[4], older) + times(by[5], current - previous))).to(last.dtype)
