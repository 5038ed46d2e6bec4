"""Which noise schedulers of diffusers a request may have: those that its pipeline's loop can call."""

from __future__ import annotations

from typing import Any

import checkpoints
import diffusers
import pytest
import tiny
from diffusers.utils import DummyObject
from driving import Driver, alone, config, distance

from steploom import AsyncDiffusionEngine, DiffusionRequest, InvalidRequest, noise_schedulers
from steploom.weave import untyped
from steploom.weave.noise import choice as noise_choice
from steploom.weave.noise import loop_calls
from steploom.worker.runner import Runner

SMALL = {"num_inference_steps": 3, "height": 32, "width": 32}


def test_a_noise_scheduler_goes_with_models_of_its_kind() -> None:
    flow = noise_choice.choices(diffusers.FlowMatchEulerDiscreteScheduler())
    ltx = noise_choice.choices(diffusers.LTXEulerAncestralRFScheduler())
    assert "LTXEulerAncestralRFScheduler" in flow
    assert "FlowMatchEulerDiscreteScheduler" in ltx
    assert "DDIMScheduler" not in ltx
    noise = noise_choice.choices(diffusers.DDIMScheduler())
    assert "LTXEulerAncestralRFScheduler" not in noise
    assert {"LCMScheduler", "TCDScheduler", "EDMEulerScheduler", "IPNDMScheduler", "UniPCMultistepScheduler"} <= {
        *noise
    }
    assert {"LCMScheduler", "TCDScheduler", "EDMEulerScheduler", "DDIMInverseScheduler"}.isdisjoint(flow)
    assert {"UniPCMultistepScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"} <= {*flow}
    sana = noise_choice.choices(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True))
    assert sana == flow


OF_THEIR_OWN = {
    "AmusedScheduler", "BlockRefinementScheduler", "CogVideoXDPMScheduler", "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler", "EntropyBoundScheduler", "HeliosScheduler", "KarrasVeScheduler", "PiflowScheduler",
    "RePaintScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "VQDiffusionScheduler",
}  # fmt: skip
"""Classes whose ``step`` or ``set_timesteps`` no other's pipeline calls as they need it."""


def test_a_noise_scheduler_that_a_loop_cannot_call_goes_with_no_pipeline_but_its_own() -> None:
    for base in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        assert OF_THEIR_OWN.isdisjoint(noise_choice.choices(base))
    assert [*noise_choice.choices(diffusers.SCMScheduler())] == ["SCMScheduler"]
    assert [*noise_choice.choices(diffusers.BlockRefinementScheduler())] == ["BlockRefinementScheduler"]
    assert "DDIMScheduler" not in noise_choice.choices(diffusers.DiscreteDDIMScheduler())
    assert {"RePaintScheduler", "DDIMScheduler"} <= {*noise_choice.choices(diffusers.RePaintScheduler())}

    class Own:
        """Of which nothing is known."""

        def set_timesteps(self, count: int) -> None: ...

    free = noise_choice.choices(Own())
    assert {"DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler"} <= {*free}
    assert {"KarrasVeScheduler", "VQDiffusionScheduler", "ScoreSdeVeScheduler"}.isdisjoint(free)


def test_a_noise_scheduler_that_the_pipelines_code_knows_by_name_goes_with_it() -> None:
    class Video(diffusers.CogVideoXPipeline):
        """CogVideoX calls ``step`` of one of two as it needs it; so does a class above it."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    base, pipe = diffusers.CogVideoXDDIMScheduler(), object.__new__(Video)
    assert {*noise_choice.choices(base, pipe)} - {*noise_choice.choices(base)} == {"CogVideoXDPMScheduler"}
    decoder = object.__new__(diffusers.KandinskyV22Pipeline)  # does not ask how many calls a step has
    noise = {*noise_choice.choices(diffusers.DDPMScheduler())}
    assert {*noise_choice.choices(diffusers.DDPMScheduler(), decoder)} - noise == {"UnCLIPScheduler"}


def test_cogvideox_takes_the_noise_scheduler_that_it_calls_otherwise() -> None:
    import conformance.families  # noqa: F401 - registers the cases
    from conformance.case import CASES

    case = CASES["CogVideoXPipeline"]
    pipe = case.build()
    params = {**case.inputs(0), "num_inference_steps": 3, "output_type": "latent"}
    name = "CogVideoXDPMScheduler"
    requests = [
        DiffusionRequest(request_id="own", seed=1, **params),
        DiffusionRequest(request_id="dpm", seed=1, noise_scheduler=name, **params),
    ]
    driver = Driver(Runner.from_pipeline(pipe, config()))
    assert name in driver.runner.info.noise_schedulers
    driver.drain(requests)
    own, dpm = (driver.finished[name].output for name in ("own", "dpm"))
    assert distance(own, alone(pipe, requests[0])) <= 1e-4
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    assert distance(dpm, alone(pipe, requests[1])) <= 1e-4
    assert distance(dpm, own) > 2e-3


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_class_for_either_kind_is_set_to_what_the_model_predicts(name: str) -> None:
    """By the configuration of a flow matching one alone it would have the sigmas of noise, and make noise."""
    pipe = tiny.sd3()
    params = {"prompt": "a cat", "seed": 1, "output_type": "latent", **SMALL}
    own = DiffusionRequest(request_id="own", **params)
    other = DiffusionRequest(request_id="other", noise_scheduler=name, **params)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain([own, other])
    made, expected = (driver.finished[one].output for one in ("other", "own"))
    assert made[0].std() < 2 * expected[0].std()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **FLOW)
    assert distance(made, alone(pipe, other)) <= 1e-4


def test_whose_settings_say_which_kind_it_is_keeps_them() -> None:
    def made(base: Any, **settings: Any) -> Any:
        return noise_choice.replacement(base, {"class": "UniPCMultistepScheduler", **settings}).config

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert FLOW.items() <= made(flow).items()
    assert {**FLOW, "flow_shift": 5.0}.items() <= made(flow, flow_shift=5.0, use_flow_sigmas=True).items()
    assert not made(flow, use_flow_sigmas=False).use_flow_sigmas
    assert made(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).flow_shift == 1.0
    assert not made(diffusers.DDIMScheduler()).use_flow_sigmas
    assert made(diffusers.DPMSolverMultistepScheduler(**FLOW)).flow_shift == 3.0
    mixed = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    assert not made(mixed).use_flow_sigmas


@pytest.mark.slow
async def test_every_noise_scheduler_that_is_said_to_go_makes_a_picture() -> None:
    from conformance import parts_sd

    small = {**SMALL, "num_inference_steps": 4}  # PNDM makes nothing in three
    for pipe in (diffusers.StableDiffusionPipeline(**parts_sd.parts(parts_sd.ddim())), tiny.sd3()):
        async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
            for name in engine.info.noise_schedulers:
                out = await engine.generate("a cat", seed=1, noise_scheduler=name, output_type="latent", **small)
                assert out.output[0].isfinite().all(), name
            assert len(engine.info.noise_schedulers) > 10
            assert await refused(engine, "RePaintScheduler") == "noise_scheduler"


def test_a_setting_that_is_no_number_is_named() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        InvalidRequest, match=r"noise_scheduler\['shift'\]='big': FlowMatchEulerDiscreteScheduler takes a"
    ):
        noise_choice.replacement(flow, {"shift": "big"})
    assert noise_choice.replacement(flow, {"shift": 2, "use_dynamic_shifting": True}).config.shift == 2
    unbounded = noise_schedulers.by_name(diffusers.DPMSolverMultistepScheduler())  # lambda_min_clipped is -inf
    noise_choice.replacement(diffusers.DDIMScheduler(), unbounded)


async def refused(engine: AsyncDiffusionEngine, name: str) -> str | None:
    with pytest.raises(InvalidRequest, match="goes with the model's") as caught:
        await engine.generate("a cat", noise_scheduler=name, **SMALL)
    return caught.value.field


async def test_a_noise_scheduler_that_lacks_a_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class LMSDiscreteScheduler(metaclass=DummyObject):  # what diffusers has in its place where scipy is missing
        _backends = ("torch", "no_such_package")

    classes = {**untyped.noise_scheduler_classes(), "LMSDiscreteScheduler": LMSDiscreteScheduler}
    monkeypatch.setattr(untyped, "noise_scheduler_classes", lambda: classes)
    forget()
    try:
        flow, noise = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.DDIMScheduler()
        assert "LMSDiscreteScheduler" not in noise_choice.choices(noise)
        assert "LMSDiscreteScheduler" not in noise_choice.lacking(flow)
        words = "noise_scheduler='LMSDiscreteScheduler': needs no_such_package, which is not installed where the model"
        with pytest.raises(InvalidRequest, match=words):
            noise_choice.replacement(noise, "LMSDiscreteScheduler")
        async with AsyncDiffusionEngine.from_pipeline(checkpoints.stable_diffusion()) as engine:
            with pytest.raises(InvalidRequest, match=words) as caught:
                await engine.generate("a cat", noise_scheduler="LMSDiscreteScheduler", **SMALL)
            assert caught.value.field == "noise_scheduler"
            (stats,) = await engine.collective_rpc("stats")
            assert stats.ticks == 0
    finally:
        forget()


def forget() -> None:
    noise_choice._CHOICES.clear()
    noise_choice._known.cache_clear()
    noise_choice._lacking.cache_clear()


TOLD_LESS = {"FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "MiniMaxH3Scheduler"}
"""Whose ``set_timesteps`` knows nothing of ``mu``."""


@pytest.mark.parametrize("build", [tiny.flux, pytest.param(tiny.qwen_image, marks=pytest.mark.slow)])
async def test_a_noise_scheduler_that_cannot_be_told_its_steps_is_refused_before_any_work(build: Any) -> None:
    async with AsyncDiffusionEngine.from_pipeline(build()) as engine:
        assert TOLD_LESS.isdisjoint(engine.info.noise_schedulers)
        assert await refused(engine, "FlowMatchHeunDiscreteScheduler") == "noise_scheduler"
        for name in engine.info.noise_schedulers:
            out = await engine.generate("a cat", seed=1, noise_scheduler=name, output_type="latent", **SMALL)
            assert out.output[0].isfinite().all(), name
        assert len(engine.info.noise_schedulers) > 1
        (stats,) = await engine.collective_rpc("stats")
    assert stats.ticks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["HeliosPipeline", "ZImagePipeline", "StableDiffusion3Img2ImgPipeline", "ConsistencyModelPipeline"]
)
def test_what_is_listed_can_be_called_by_the_loop(name: str) -> None:
    import conformance.families  # noqa: F401 - registers the cases
    from conformance.case import CASES

    case = CASES[name]
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    base = pipe.scheduler
    listed = noise_choice.choices(base, pipe)
    assert type(base).__name__ in listed
    assert len(noise_choice.choices(base)) > len(listed) > 1
    inputs = {key: value for key, value in case.inputs(0).items() if key != "seed"}
    for one in listed:
        pipe.scheduler = noise_choice.replacement(base, one, pipe)
        pipe(**inputs | {"num_inference_steps": 4})


def test_a_loop_says_what_it_does_in_any_case_alone() -> None:
    class Loop:
        """Nothing within a branch, or behind an ``and``, counts."""

        scheduler: Any = None

        def __call__(self, sigmas: Any = None) -> None:
            sigmas = [1.0] if sigmas is None else sigmas
            self.scheduler.set_timesteps(4, sigmas=sigmas, mu=0.5)
            if hasattr(self.scheduler, "order") and self.scheduler.order > 1:
                self.scheduler.set_begin_index(0)
            self.prepare(self.scheduler.config.sigma_max)

        def prepare(self, most: float) -> None:
            for t in self.scheduler.timesteps:
                self.scheduler.step(most, t, most, generator=None).prev_sample + self.scheduler.scale_noise(1)

    loop = loop_calls.loop_of(Loop)
    assert loop is not None
    assert loop.reads == {"set_timesteps", "config.sigma_max", "timesteps", "step", "scale_noise"}
    assert [sorted(keywords) for keywords in loop.tells] == [["mu", "sigmas"]]
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert loop_calls.fault(loop, flow) == "it has no config.sigma_max"
    assert "cannot be told its steps" in (loop_calls.fault(loop, diffusers.DDIMScheduler()) or "")
