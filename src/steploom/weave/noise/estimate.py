"""The estimate of the finished latents (x0) that a step starts from, whatever the noise scheduler's model predicts.

Some noise schedulers return it. For the others it follows from the model output, as
``sample = alpha x0 + sigma noise``: https://arxiv.org/abs/2010.02502, equation 12, for alphas;
https://arxiv.org/abs/2206.00364 for sigmas and preconditioning; flow matching has ``alpha = 1 - sigma``.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch

_OWN = ("pred_original_sample", "denoised")
"""What noise schedulers call the estimate where they return it."""


def estimate(noise_scheduler: Any, result: Any, index: int | None, arguments: Mapping[str, Any]) -> Any:
    """x0 as of a step that is done.

    Args:
        noise_scheduler: After the step.
        result: What ``step`` returned.
        index: The noise scheduler's step index before it, where it keeps one.
        arguments: Those of ``step`` by name; ``model_output``, ``timestep`` and ``sample [rows, ...]`` among them.

    Returns:
        ``[rows, ...]`` like ``sample``; the sample itself where nothing better is known.
    """
    own = _returned(noise_scheduler, result)
    if own is not None:
        return own
    sample, output = arguments.get("sample"), arguments.get("model_output")
    if not isinstance(sample, torch.Tensor) or not isinstance(output, torch.Tensor):
        return sample
    if output.ndim == sample.ndim and output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
        output = output[:, : sample.shape[1]]  # the other half is a learned variance
    found = _converted(noise_scheduler, _sigma(noise_scheduler, index, arguments), output.float(), arguments)
    return sample if found is None else found.to(sample.dtype)


def _returned(noise_scheduler: Any, result: Any) -> Any:
    if not isinstance(result, tuple):
        return next((getattr(result, name) for name in _OWN if getattr(result, name, None) is not None), None)
    place = _place(type(noise_scheduler).__module__)
    return result[place] if place is not None and place < len(result) else None


@functools.cache
def _place(module: str) -> int | None:
    """Where the estimate stands in the tuple that ``step`` returns: tuples are in the order of the output's fields."""
    names = vars(sys.modules[module]) if module in sys.modules else {}
    for name, kind in list(names.items()):
        if name.endswith("Output") and isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields = [field.name for field in dataclasses.fields(kind)]
            return next((fields.index(own) for own in _OWN if own in fields), None)
    return None


def _sigma(noise_scheduler: Any, index: int | None, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The noise level of the step, where the noise scheduler keeps noise levels. No copy: it may be on the device."""
    tokens = arguments.get("per_token_timesteps")
    if tokens is not None:  # LTX: a level for each token
        return (tokens / noise_scheduler.config.num_train_timesteps)[..., None]
    sigmas = arguments.get("dmd_sigmas")
    if sigmas is not None:  # Helios: a table for each stage
        return sigmas[(arguments["dmd_timesteps"] - arguments["timestep"]).abs().argmin()]
    sigmas = getattr(noise_scheduler, "sigmas", None)
    if not isinstance(sigmas, torch.Tensor) or not len(sigmas):
        return None
    return sigmas[min(index or 0, len(sigmas) - 1)]


def _converted(
    noise_scheduler: Any, sigma: torch.Tensor | None, output: torch.Tensor, arguments: Mapping[str, Any]
) -> torch.Tensor | None:
    """x0 in float32; None where the noise scheduler does not say what its model predicts."""
    config, sample = noise_scheduler.config, arguments["sample"].float()
    kind = config.get("prediction_type", "epsilon")
    if hasattr(noise_scheduler, "precondition_outputs"):
        return noise_scheduler.precondition_outputs(sample, output, sigma)
    if hasattr(noise_scheduler, "get_scalings_for_boundary_condition") and sigma is not None:
        skip, scale = noise_scheduler.get_scalings_for_boundary_condition(sigma)
        return scale * output + skip * sample
    if kind in ("sample", "original_sample"):
        return output
    if _flows(noise_scheduler):
        return None if sigma is None else sample + _way(noise_scheduler, sigma.to(sample.device), arguments) * output
    if sigma is not None and not hasattr(noise_scheduler, "_sigma_to_alpha_sigma_t"):
        alpha = (sigma**2 + 1) ** -0.5  # Karras' samples grow with the noise
        sample, sigma = sample * alpha, sigma * alpha
    else:
        alpha, sigma = _levels(noise_scheduler, sigma, arguments["timestep"], sample)
    if alpha is None or sigma is None:
        return None
    return alpha * sample - sigma * output if kind == "v_prediction" else (sample - sigma * output) / alpha


def _flows(noise_scheduler: Any) -> bool:
    """Whether its model predicts a velocity from data to noise."""
    config, name = noise_scheduler.config, type(noise_scheduler).__name__
    return (
        config.get("prediction_type") in ("flow_prediction", "flow")
        or bool(config.get("use_flow_sigmas"))
        or any(word in name for word in ("Flow", "RF", "Helios"))
    )


def _way(noise_scheduler: Any, sigma: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """How far along its velocity a sample is from the data: ``-sigma``, but where time or velocity run backwards."""
    config = noise_scheduler.config
    if config.get("stochastic_sampling") or "LCM" in type(noise_scheduler).__name__:
        return -sigma  # these compute x0 themselves, like this
    if arguments.get("per_token_timesteps") is not None:
        return sigma  # pipelines hand in the velocity from noise to data, and the noise scheduler adds it
    return 1 - sigma if config.get("invert_sigmas") else -sigma  # Mochi: data is at 1


def _levels(noise_scheduler: Any, sigma: Any, timestep: Any, sample: torch.Tensor) -> tuple[Any, Any]:
    """``alpha`` and ``sigma`` of a sample of constant variance; None where there are neither sigmas nor alphas."""
    if sigma is not None:
        return noise_scheduler._sigma_to_alpha_sigma_t(sigma)
    if hasattr(noise_scheduler, "_alpha_cumprod"):
        alpha = noise_scheduler._alpha_cumprod(timestep, sample.device).view(-1, *[1] * (sample.ndim - 1))
    elif getattr(noise_scheduler, "alphas_cumprod", None) is not None:
        at = timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep
        alpha = noise_scheduler.alphas_cumprod[int(at)].to(sample.device)
    else:
        return None, None
    return alpha.sqrt(), (1 - alpha).sqrt()
