"""The estimate of x0: exact for every noise scheduler if the model's prediction is."""

from __future__ import annotations

import diffusers
import pytest
import torch
from hearing import Heard

from steploom.weave.noise import observed as noise

STEPS = 6
EPSILON = ("epsilon", "v_prediction", "sample")
PREDICTING = (
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler",
    "TCDScheduler", "HeunDiscreteScheduler", "CogVideoXDDIMScheduler",
)  # fmt: skip
ALWAYS_NOISE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
                "KDPM2AncestralDiscreteScheduler", "DDIMParallelScheduler")  # fmt: skip
CASES = [
    *[(name, {"prediction_type": kind}) for name in PREDICTING for kind in EPSILON],
    *[(name, {}) for name in ALWAYS_NOISE],
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]  # fmt: skip

CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "HeunDiscreteScheduler",
            "CogVideoXDDIMScheduler", "TCDScheduler")  # fmt: skip


def name_of(value: str | dict) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


def prediction(kind: str, alpha: torch.Tensor, sigma: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor):
    if kind.startswith("flow"):
        return eps - x0
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]


def levels(own, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Alpha and sigma of constant variance, and what the sample is scaled by."""
    one = torch.ones(())
    if "Flow" in type(own).__name__ or own.config.get("use_flow_sigmas"):
        return 1 - own.sigmas[index], own.sigmas[index], one
    if isinstance(getattr(own, "sigmas", None), torch.Tensor):
        alpha = (own.sigmas[index] ** 2 + 1) ** -0.5
        scaled = hasattr(own, "_sigma_to_alpha_sigma_t")
        return alpha, own.sigmas[index] * alpha, one if scaled else 1 / alpha
    alpha = own.alphas_cumprod[int(own.timesteps[index])]
    return alpha.sqrt(), (1 - alpha).sqrt(), one


@pytest.mark.parametrize(("name", "settings"), CASES, ids=name_of)
def test_a_perfect_prediction_gives_the_data(name: str, settings: dict) -> None:
    base = {"clip_sample": False} if name in CLIPPING else {}
    scheduler = getattr(diffusers, name)(**base, **settings)
    scheduler.set_timesteps(STEPS)
    ends = Heard()
    own = noise.observe(scheduler, ends)
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    kind = "flow" if name.startswith("FlowMatch") else settings.get("prediction_type", "epsilon")
    alpha, sigma, scale = levels(own, 0)
    sample = (alpha * x0 + sigma * eps) * scale
    if hasattr(own, "scale_model_input"):
        own.scale_model_input(sample, own.timesteps[0])
    arguments = {"eta": 0.3} if name == "TCDScheduler" else {}
    own.step(prediction(kind, alpha, sigma, x0, eps), own.timesteps[0], sample, return_dict=False, **arguments)
    noise.forget(own)
    torch.testing.assert_close(ends[0].estimate(), x0, rtol=1e-3, atol=2e-3)
    assert (ends[0].latents - x0).abs().max() > 0.1, "the first step does not end at the data"


def test_the_other_half_of_a_learned_variance_is_left_out() -> None:
    own = noise.observe(diffusers.DPMSolverMultistepScheduler(variance_type="learned_range"), ends := Heard())
    own.set_timesteps(STEPS)
    x0 = eps = torch.ones(1, 3, 4, 4)
    alpha, sigma, _ = levels(own, 0)
    own.step(torch.cat([eps, eps * 7], dim=1), own.timesteps[0], alpha * x0 + sigma * eps)
    noise.forget(own)
    torch.testing.assert_close(ends[0].estimate(), x0, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_estimate_of_tokens_at_levels_of_their_own(stochastic: bool) -> None:
    """LTX's and SANA-WM's pipelines hand in the velocity from noise to data; the noise scheduler adds it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    scheduler.set_timesteps(STEPS)
    own = noise.observe(scheduler, ends := Heard())
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 5, 4, generator=draw) for _ in range(2))
    sigmas = own.sigmas[torch.tensor([[0, 0, 2, 3, STEPS]])]  # the last token is given, without noise
    sample = (1 - sigmas[..., None]) * x0 + sigmas[..., None] * eps
    velocity = eps - x0 if stochastic else x0 - eps
    own.step(velocity, own.timesteps[0], sample, per_token_timesteps=sigmas * 1000, return_dict=False)
    noise.forget(own)
    torch.testing.assert_close(ends[0].estimate(), x0, rtol=1e-3, atol=2e-3)
    assert stochastic or (ends[0].latents - x0).abs().max() < (sample - x0).abs().max(), "a step goes towards the data"


def test_the_estimate_where_data_is_at_one() -> None:
    """Mochi's noise scheduler counts from noise to data."""
    own = noise.observe(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), ends := Heard())
    own.set_timesteps(STEPS)
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    sample = x0 * own.sigmas[0] + eps * (1 - own.sigmas[0])
    for index in range(STEPS):
        sample = own.step(x0 - eps, own.timesteps[index], sample, return_dict=False)[0]
    noise.forget(own)
    torch.testing.assert_close(sample, x0, rtol=1e-3, atol=2e-3)
    for end in ends:
        torch.testing.assert_close(end.estimate(), x0, rtol=1e-3, atol=2e-3)
