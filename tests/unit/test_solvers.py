"""Steps of noise schedulers taken together are the steps that diffusers takes alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from steploom.weave.batching.wholes import Wholes
from steploom.weave.noise.solvers import row_step, run

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES: list[tuple[type, dict[str, Any]]] = [
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    *[(EulerDiscreteScheduler, {"prediction_type": p}) for p in PREDICTIONS],
    (EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    *[(DDIMScheduler, {"prediction_type": p, "clip_sample": p == "epsilon"}) for p in PREDICTIONS],
    (DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    *[(DPMSolverMultistepScheduler, {"prediction_type": p}) for p in PREDICTIONS],
    (DPMSolverMultistepScheduler, {"solver_type": "heun", "use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"solver_order": 1}),
    (DPMSolverMultistepScheduler, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, FLOW),
    *[(UniPCMultistepScheduler, {"prediction_type": p}) for p in PREDICTIONS],
    (UniPCMultistepScheduler, FLOW),
    (UniPCMultistepScheduler, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    (UniPCMultistepScheduler, {"solver_order": 1}),
    (UniPCMultistepScheduler, {"disable_corrector": [1, 2]}),
    (UniPCMultistepScheduler, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
]  # fmt: skip


class Loop:
    """A pipeline's loop over one noise scheduler, whose model is a function that depends on everything."""

    def __init__(self, kind: type, config: dict[str, Any], steps: int, seed: int, dtype: torch.dtype) -> None:
        self.scheduler = kind(**config)
        self.scheduler.set_timesteps(steps)
        noise = torch.Generator().manual_seed(seed)
        self.sample = torch.randn(1 + seed % 2, 4, 5, 3, generator=noise).to(dtype)
        self.weight = torch.randn(4, 4, generator=noise) / 2
        self.timesteps = list(self.scheduler.timesteps)

    def arguments(self) -> dict[str, Any]:
        timestep = self.timesteps[0]
        given = self.sample
        if hasattr(self.scheduler, "scale_model_input"):
            given = self.scheduler.scale_model_input(given, timestep)
        mixed = torch.einsum("nchw,dc->ndhw", given.float(), self.weight) * (1 + float(timestep) / 1000)
        output = torch.tanh(mixed).to(self.sample.dtype)
        return {"model_output": output, "timestep": timestep, "sample": self.sample, "return_dict": False}

    def take(self, result: tuple[Any, ...]) -> None:
        self.sample = result[0]
        self.timesteps = self.timesteps[1:]


def loops(kind: type, config: dict[str, Any], dtype: torch.dtype) -> list[Loop]:
    return [Loop(kind, config, steps, seed, dtype) for seed, steps in enumerate((5, 9, 20, 9))]


def step_alone(loop: Loop) -> None:
    loop.take(loop.scheduler.step(**loop.arguments()))


def step_together(those: list[Loop]) -> int:
    """Takes one step of each; returns how many were taken together."""
    steps = [row_step(type(loop.scheduler), loop.scheduler, loop.arguments()) for loop in those]
    groups: dict[Any, list[int]] = {}
    for i, step in enumerate(steps):
        groups.setdefault(i if step is None else step.key, []).append(i)
    for members in groups.values():
        rows = [step for i in members if (step := steps[i]) is not None]
        if rows:
            for i, result in zip(members, run(rows, Wholes()), strict=True):
                those[i].take(result)
        else:
            step_alone(those[members[0]])
    return sum(len(members) for members in groups.values() if len(members) > 1)


@pytest.mark.parametrize(("kind", "config"), CASES, ids=lambda value: getattr(value, "__name__", "") or str(value))
def test_steps_taken_together_are_those_taken_alone(kind: type, config: dict[str, Any]) -> None:
    together, alone = loops(kind, config, torch.float32), loops(kind, config, torch.float32)
    shared = 0
    while any(loop.timesteps for loop in together):
        shared += step_together([loop for loop in together if loop.timesteps])
        for one, other in zip(together, alone, strict=True):
            if len(other.timesteps) > len(one.timesteps):
                step_alone(other)
            scale = other.sample.abs().max()
            assert torch.isfinite(other.sample).all()
            assert (one.sample - other.sample).abs().max() <= 1e-6 * scale * max(1, 20 - len(other.timesteps))
    assert shared >= 20


@pytest.mark.parametrize(("kind", "config"), CASES, ids=lambda value: getattr(value, "__name__", "") or str(value))
def test_a_request_may_step_with_others_now_and_alone_then(kind: type, config: dict[str, Any]) -> None:
    changing, alone = loops(kind, config, torch.float32), loops(kind, config, torch.float32)
    for turn in range(5):
        if turn % 2:
            step_together(changing)
        else:
            for loop in changing:
                step_alone(loop)
        for one, other in zip(changing, alone, strict=True):
            step_alone(other)
            assert (one.sample - other.sample).abs().max() <= 1e-5 * other.sample.abs().max()
            state, expected = (dict(loop.scheduler.__dict__) for loop in (one, other))
            assert state.keys() == expected.keys()
            assert state.get("_step_index") == expected.get("_step_index")
            assert state.get("lower_order_nums") == expected.get("lower_order_nums")


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler, DDIMScheduler,
                                  DPMSolverMultistepScheduler])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_are_rounded_as_diffusers_rounds_them(kind: type, dtype: torch.dtype) -> None:
    config = {} if kind is FlowMatchEulerDiscreteScheduler else {"prediction_type": "v_prediction"}
    together, alone = loops(kind, config, dtype), loops(kind, config, dtype)
    assert step_together(together) == 4
    for one, other in zip(together, alone, strict=True):
        step_alone(other)
        assert one.sample.dtype is dtype
        assert torch.equal(one.sample, other.sample)


def test_what_is_not_written_down_is_not_taken_together() -> None:
    loop = Loop(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, 5, 0, torch.float32)
    assert row_step(FlowMatchEulerDiscreteScheduler, loop.scheduler, loop.arguments()) is None
    plain = Loop(FlowMatchEulerDiscreteScheduler, {}, 5, 0, torch.float32)
    assert row_step(FlowMatchEulerDiscreteScheduler, plain.scheduler, plain.arguments()) is not None
    assert row_step(FlowMatchEulerDiscreteScheduler, plain.scheduler, plain.arguments() | {"return_dict": True}) is None
    odd = plain.arguments() | {"per_token_timesteps": torch.ones(1, 5)}
    assert row_step(FlowMatchEulerDiscreteScheduler, plain.scheduler, odd) is None
    euler = Loop(EulerDiscreteScheduler, {}, 5, 0, torch.float32)
    assert row_step(EulerDiscreteScheduler, euler.scheduler, euler.arguments() | {"s_churn": 0.5}) is None
    ddim = Loop(DDIMScheduler, {}, 5, 0, torch.float32)
    assert row_step(DDIMScheduler, ddim.scheduler, ddim.arguments() | {"eta": 0.5}) is None
    heun = Loop(HeunDiscreteScheduler, {}, 5, 0, torch.float32)
    assert row_step(HeunDiscreteScheduler, heun.scheduler, heun.arguments()) is None

    class Mine(FlowMatchEulerDiscreteScheduler):
        pass

    assert row_step(Mine, plain.scheduler, plain.arguments()) is None


def test_a_step_that_is_not_taken_changes_no_more_than_the_index() -> None:
    loop = Loop(DPMSolverMultistepScheduler, {}, 5, 0, torch.float32)
    step_alone(loop)
    before = copy.deepcopy(loop.scheduler.__dict__)
    assert row_step(DPMSolverMultistepScheduler, loop.scheduler, loop.arguments()) is not None
    assert loop.scheduler.__dict__.keys() == before.keys()
    assert loop.scheduler._step_index == before["_step_index"]
    assert loop.scheduler.lower_order_nums == before["lower_order_nums"]


def test_a_new_schedule_has_new_coefficients() -> None:
    loop, other = (Loop(FlowMatchEulerDiscreteScheduler, {}, 5, 0, torch.float32) for _ in range(2))
    step_together([loop, other])
    for one in (loop, other):
        one.scheduler.set_timesteps(9)
        one.timesteps = list(one.scheduler.timesteps)
    expected = copy.deepcopy(loop)
    step_together([loop, other])
    step_alone(expected)
    assert torch.equal(loop.sample, expected.sample)
