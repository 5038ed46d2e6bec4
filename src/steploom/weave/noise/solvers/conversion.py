"""What multistep solvers make of a model's output first: the estimate of x0.

``convert_model_output`` of ``diffusers/schedulers/scheduling_dpmsolver_multistep.py`` (``dpmsolver++``) and of
``scheduling_unipc_multistep.py`` (``predict_x0``).
"""

from __future__ import annotations

from typing import Any

import torch

from steploom.weave.noise.solvers.rows import Tensors, over, times

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def levels(own: Any, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Alpha, sigma, and the logarithm of their ratio, of all steps; ``_sigma_to_alpha_sigma_t`` upstream."""
    if own.config.use_flow_sigmas:
        alpha, sigma = 1 - sigmas, sigmas
    else:
        alpha = 1 / ((sigmas**2 + 1) ** 0.5)
        sigma = sigmas * alpha
    return alpha, sigma, torch.log(alpha) - torch.log(sigma)


def denoised(prediction: str, sample: torch.Tensor, output: torch.Tensor, by: Tensors) -> torch.Tensor:
    """The estimate of x0 ``[rows, ...]``.

    Args:
        prediction: What the model predicts, one of :data:`PREDICTIONS`.
        sample: ``[rows, ...]``.
        output: Likewise.
        by: Alpha, sigma, and sigma as it is in the schedule (flow matching), one per row.
    """
    if prediction == "epsilon":
        return over(sample - times(by[1], output), by[0])
    if prediction == "v_prediction":
        return times(by[0], sample) - times(by[1], output)
    return output if prediction == "sample" else sample - times(by[2], output)
