"""Programs: suspended, resumed, thrown into, unwound; and what they must not leak into each other."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hearing import Heard

from steploom.weave.calls import ModuleCall
from steploom.weave.noise import observed as noise
from steploom.weave.order import CallOrder, is_denoiser
from steploom.weave.program import Program, suspend, why_alone
from steploom.weave.watching import Watcher


@pytest.fixture(autouse=True)
def hub_modes():
    with torch.no_grad():
        yield


class Target:
    name, key, group, method, ragged, adapted, module = "transformer", "t", "t", "forward", None, None, None

    def invoke(self, x: Any) -> Any:
        return x


def ask(x: Any) -> Any:
    return suspend(ModuleCall(Target(), (x,), {}))  # pyright: ignore


def program(body: Any) -> Program:
    return Program("p", body, Watcher())


def test_a_program_stops_at_each_call_and_goes_on_with_the_answer():
    made = program(lambda: ask(1) + ask(2))
    made.resume()
    assert made.call is not None
    assert made.call.run() == 1
    made.resume(10)
    assert made.call.run() == 2
    made.resume(20)
    assert made.done
    assert made.output == 30


def test_a_fault_is_thrown_where_the_call_was_made():
    def body() -> Any:
        try:
            return ask(1)
        except ValueError as error:
            return f"handled {error}"

    made = program(body)
    made.resume()
    made.resume(error=ValueError("it"))
    assert made.output == "handled it"


def test_an_unhandled_fault_ends_the_program():
    made = program(lambda: 1 / 0)
    made.resume()
    assert made.done
    assert isinstance(made.error, ZeroDivisionError)


def test_unwinding_runs_finally_blocks_and_frees_frames():
    log: list[str] = []

    class Big:
        pass

    kept: list[Any] = []

    def body() -> None:
        big = Big()
        kept.append(weakref.ref(big))
        try:
            ask(1)
        finally:
            log.append("finally")

    made = program(body)
    made.resume()
    made.unwind()
    assert log == ["finally"]
    assert made.done
    del made
    gc.collect()
    assert kept[0]() is None


def test_unwinding_a_program_that_resists():
    def body() -> None:
        while True:
            try:
                ask(1)
            except BaseException:  # noqa: BLE001 - what no pipeline should do
                ask(2)
                return

    made = program(body)
    made.resume()
    made.unwind()
    assert made.done


def test_autocast_does_not_leak_into_other_programs():
    def body() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            suspend(noise.StepEnd(None, {}, None, lambda: None))
            return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    made = program(body)
    made.resume()
    assert not torch.is_autocast_enabled("cpu")
    made.resume()
    assert made.output == (True, torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")


def test_calls_under_other_modes_run_at_once():
    seen: list[bool] = []

    def body() -> None:
        seen.append(why_alone() is None)
        with torch.enable_grad():
            seen.append(why_alone() is None)
        with torch.inference_mode():
            seen.append(why_alone() is None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(why_alone() is None)

    program(body).resume()
    assert seen == [True, False, False, False]
    assert why_alone() is not None, "outside a program nothing is shared"


def test_context_variables_are_the_programs_own():
    import contextvars

    var: contextvars.ContextVar[int] = contextvars.ContextVar("var", default=0)

    def body() -> Any:
        var.set(5)
        ask(1)
        return var.get()

    made = program(body)
    made.resume()
    assert var.get() == 0
    made.resume()
    assert made.output == 5


def steps_of(scheduler: Any, count: int = 4) -> tuple[list[noise.StepEnd], Any]:
    ends = Heard()
    own = noise.observe(scheduler, ends)
    own.set_timesteps(count)
    latents = torch.ones(1, 2, 2, 2)
    for t in own.timesteps:
        latents = own.step(0.1 * latents, t, latents, return_dict=False)[0]
    return ends, own


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler, DDIMScheduler])
def test_every_step_is_observed_and_the_original_is_untouched(cls):
    original = cls()
    before = {k: repr(v) for k, v in vars(original).items()}
    ends, own = steps_of(original)
    assert len(ends) == 4
    assert type(own).__name__ == cls.__name__
    assert isinstance(own, cls)
    assert type(original) is cls
    assert {k: repr(v) for k, v in vars(original).items()} == before
    noise.forget(own)


def test_copies_made_by_the_pipeline_do_not_end_steps():
    ends = Heard()
    own = noise.observe(FlowMatchEulerDiscreteScheduler(), ends)
    own.set_timesteps(3)
    twin = copy.deepcopy(own)
    x = torch.ones(1, 1, 2, 2)
    twin.step(x, twin.timesteps[0], x)
    assert ends == []
    own.step(x, own.timesteps[0], x)
    assert len(ends) == 1
    noise.forget(own)


def test_estimates_of_x0_for_flow_matching_are_exact_for_a_straight_path():
    """x = (1 - s) x0 + s e moves with v = e - x0: the estimate is x0 from every step."""
    x0, e = torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), -1.1)
    ends = Heard()
    own = noise.observe(FlowMatchEulerDiscreteScheduler(), ends)
    own.set_timesteps(4)
    x = e
    for t in own.timesteps:
        x = own.step(e - x0, t, x, return_dict=False)[0]
    for end in ends:
        assert torch.allclose(end.estimate(), x0, atol=1e-5)
    assert [round(end.sigma, 3) for end in ends] == [0.667, 0.334, 0.001, 0.0]
    noise.forget(own)


def test_estimates_of_x0_for_epsilon_models():
    x0, e = torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), -1.1)
    ends = Heard()
    own = noise.observe(DDIMScheduler(), ends)
    own.set_timesteps(5)
    alpha = own.alphas_cumprod[own.timesteps[0]]
    own.step(e, own.timesteps[0], alpha.sqrt() * x0 + (1 - alpha).sqrt() * e, return_dict=False)
    assert torch.allclose(ends[0].estimate(), x0, atol=1e-4)
    noise.forget(own)


def test_order_is_learned_and_never_deadlocks():
    order = CallOrder()
    for before, after in [(None, "text_encoder"), ("text_encoder", "controlnet"), ("controlnet", "unet")]:
        order.saw(before, after)
    order.saw(None, "vae")
    assert order.first({"unet", "controlnet"}) == "controlnet"
    assert order.first({"unet", "text_encoder"}) == "text_encoder"
    assert order.first({"vae", "unet"}) == "unet"
    order.saw("unet", "controlnet")  # a cycle: two control nets around a unet
    assert order.first({"unet", "controlnet"}) in {"unet", "controlnet"}


def test_denoisers_by_name():
    assert all(map(is_denoiser, ["transformer", "unet", "transformer_2", "controlnet", "prior", "prior_pipe.prior"]))
    assert not any(map(is_denoiser, ["text_encoder_2", "vae", "image_encoder", "vqgan", "decoder_pipe.text_encoder"]))


def test_a_program_without_steps_goes_on_in_the_next_tick():
    """Nobody waits for a loop that reports no steps: it is given a bounded number of calls a tick."""
    from steploom.weave.hub import CALLS_PER_TICK, Hub

    made = program(lambda: sum(ask(torch.ones(1, 2)).sum().item() for _ in range(2 * CALLS_PER_TICK + 1)))
    hub, ticks = Hub(0), 0
    while not made.done:
        hub.tick([made])
        ticks += 1
    assert made.error is None
    assert made.output == 2 * (2 * CALLS_PER_TICK + 1)
    assert ticks == 3
