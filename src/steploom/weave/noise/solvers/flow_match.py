"""Euler steps of flow matching: ``diffusers/schedulers/scheduling_flow_match_euler_discrete.py``, ``step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steploom.weave.noise.solvers.rows import RowStep, Tensors, begin, columns, fractional, plain, times

_ALLOWED = frozenset({"model_output", "timestep", "sample", "generator", "s_churn", "s_tmin", "s_tmax", "s_noise",
                      "return_dict"})  # fmt: skip


def step(own: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step; None with stochastic sampling or a timestep per token."""
    if not plain(arguments, _ALLOWED) or own.config.stochastic_sampling or not fractional(arguments["timestep"]):
        return None
    index = begin(own, arguments["timestep"])
    interval = columns(own, _columns)["interval"][index]

    def settled(results: list[torch.Tensor]) -> tuple[Any, ...]:
        own._step_index += 1
        return (results[0],)

    return RowStep(_formula, [arguments["sample"], arguments["model_output"]], [interval], settled)


def _columns(own: Any, sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"interval": sigmas[1:] - sigmas[:-1]}


def _formula(tensors: Tensors, coefficients: Tensors) -> list[torch.Tensor]:
    sample, output = tensors
    return [(sample.float() + times(coefficients[0], output)).to(output.dtype)]
