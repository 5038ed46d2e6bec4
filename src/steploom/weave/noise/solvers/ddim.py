"""DDIM steps: ``diffusers/schedulers/scheduling_ddim.py``, ``step``, without noise (``eta`` 0).

Formulas (12) and (16) of https://arxiv.org/abs/2010.02502.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from steploom.weave.noise.solvers.rows import Formula, RowStep, Tensors, over, plain, times

_ALLOWED = frozenset({"model_output", "timestep", "sample", "eta", "use_clipped_model_output", "generator",
                      "return_dict"})  # fmt: skip
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def step(own: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step; None with noise, thresholding, or a timestep on a device, for whose value one would wait."""
    config, timestep = own.config, arguments["timestep"]
    if not plain(arguments, _ALLOWED) or arguments.get("eta") or arguments.get("use_clipped_model_output"):
        return None
    if config.thresholding or config.prediction_type not in _PREDICTIONS or own.num_inference_steps is None:
        return None
    if isinstance(timestep, torch.Tensor) and (timestep.device.type != "cpu" or timestep.numel() != 1):
        return None
    clip = config.clip_sample_range if config.clip_sample else None
    tensors = [arguments["sample"], arguments["model_output"]]
    kind = config.prediction_type
    formula = _FORMULAS[kind] if clip is None else _clipped(kind, clip)
    return RowStep(formula, tensors, _coefficients(own, int(timestep)), _settled)


def _coefficients(own: Any, timestep: int) -> list[float]:
    """Roots of alpha, beta, the next alpha, and of what is left of it."""
    before = timestep - own.config.num_train_timesteps // own.num_inference_steps
    alpha = own.alphas_cumprod[timestep]
    next_alpha = own.alphas_cumprod[before] if before >= 0 else own.final_alpha_cumprod
    roots = torch.stack([alpha, 1 - alpha, next_alpha, 1 - next_alpha]) ** 0.5
    return roots.tolist()


def _settled(results: list[torch.Tensor]) -> tuple[Any, ...]:
    return (results[0], results[1])


def _epsilon(sample: torch.Tensor, output: torch.Tensor, by: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return over(sample - times(by[1], output), by[0]), output


def _sample(sample: torch.Tensor, output: torch.Tensor, by: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return output, over(sample - times(by[0], output), by[1])


def _velocity(sample: torch.Tensor, output: torch.Tensor, by: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return times(by[0], sample) - times(by[1], output), times(by[0], output) + times(by[1], sample)


def _formula(predict: Any, clip: float | None, tensors: Tensors, by: Tensors) -> list[torch.Tensor]:
    denoised, noise = predict(tensors[0], tensors[1], by)
    if clip is not None:
        denoised = denoised.clamp(-clip, clip)
    return [times(by[2], denoised) + times(by[3], noise), denoised]


_PREDICTED = {"epsilon": _epsilon, "sample": _sample, "v_prediction": _velocity}
_FORMULAS = {name: partial(_formula, predict, None) for name, predict in _PREDICTED.items()}


@functools.lru_cache(maxsize=64)
def _clipped(prediction: str, clip: float) -> Formula:
    """The formula with clipping; one object for each range, since steps are told apart by their formulas."""
    return partial(_formula, _PREDICTED[prediction], clip)
