"""What users of diffusers expect: lists of prompts, a noise scheduler, callbacks, the safety checker's verdict."""

from __future__ import annotations

from typing import Any

import checkpoints
import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from driving import Driver, alone, assert_cares, config, distance, request

from steploom import AsyncDiffusionEngine, DiffusionRequest, InvalidRequest
from steploom.worker.runner import Runner

SMALL = {"num_inference_steps": 3, "height": 32, "width": 32}


def latents(name: str, prompt: Any, seed: int, **params: Any) -> DiffusionRequest:
    return request(name, prompt, seed, **{**SMALL, **params})


def assert_equal(driver: Driver, pipe: Any, requests: list[DiffusionRequest]) -> None:
    expected = {one.request_id: alone(pipe, one) for one in requests}
    assert_cares(expected, 1e-4)
    for one in requests:
        report = driver.finished[one.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[one.request_id]) <= 1e-4, one.request_id


def test_a_list_of_prompts_is_one_request_beside_others() -> None:
    pipe = tiny.sd3()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    requests = [
        latents("list", ["a cat", "two dogs"], 1, negative_prompt=["grey", "flat"]),
        latents("one", "a cow", 2),
        latents("three", ["a hen", "a pig", "an ox"], 3, guidance_scale=2.0),
    ]
    driver.drain(requests)
    assert driver.finished["list"].output[0].shape[0] == 2
    assert_equal(driver, pipe, requests)
    assert max(driver.sharing("one")) == 3


async def test_a_list_of_steps_needs_no_number_of_them() -> None:
    """It "must be None" beside a list by diffusers' documents, while it has a default everywhere."""
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    params: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent", "num_inference_steps": None}
    expected = pipe("a cat", sigmas=[1.0, 0.5, 0.2], generator=torch.Generator("cpu").manual_seed(1), **params)
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        out = await engine.generate("a cat", seed=1, sigmas=[1.0, 0.5, 0.2], **params)
        with pytest.raises(InvalidRequest, match="num_inference_steps=None: must be"):
            await engine.generate("a cat", **params)
    assert distance(out.output, expected) <= 1e-4
    assert DiffusionRequest("x", prior_timesteps=[1.0], prior_num_inference_steps=None, sigmas=None).params.keys() == {
        "prior_timesteps", "sigmas"
    }  # fmt: skip


@pytest.mark.slow
async def test_a_list_of_generators_gives_each_image_its_own() -> None:
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)

    def generators() -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]

    params = {**SMALL, "output_type": "latent"}
    expected = pipe(["a cat", "a dog"], generator=generators(), **params)
    given = generators()
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        out = await engine.generate(["a cat", "a dog"], generator=given, **params)
    assert distance(out.output, expected) <= 1e-4
    assert given[0].get_state().equal(_advanced(generators(), pipe, params)[0].get_state())


def _advanced(generators: list[torch.Generator], pipe: Any, params: dict[str, Any]) -> list[torch.Generator]:
    pipe(["a cat", "a dog"], generator=generators, **params)
    return generators


OTHERS: dict[str, Any] = {
    "by name": ("EulerDiscreteScheduler", lambda base: EulerDiscreteScheduler.from_config(base)),
    "with settings": (
        {"class": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
        lambda base: DPMSolverMultistepScheduler.from_config(base, use_karras_sigmas=True),
    ),
    "of its own class": ({"beta_end": 0.02}, lambda base: DDIMScheduler.from_config(base, beta_end=0.02)),
    "a class": (UniPCMultistepScheduler, lambda base: UniPCMultistepScheduler.from_config(base)),
    "an object": (
        EulerAncestralDiscreteScheduler(beta_end=0.015),
        lambda base: EulerAncestralDiscreteScheduler(beta_end=0.015),
    ),
}


def test_each_request_can_have_its_own_noise_scheduler() -> None:
    from conformance import parts_sd
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**parts_sd.parts(parts_sd.ddim()))
    driver = Driver(Runner.from_pipeline(pipe, config()))
    plain = latents("plain", "a cat", 1, num_inference_steps=5)
    others = {
        way: DiffusionRequest(
            "a cat", request_id=way, seed=1, noise_scheduler=given, output_type="latent",
            **{**SMALL, "num_inference_steps": 5},
        )
        for way, (given, _) in OTHERS.items()
    }  # fmt: skip
    driver.drain([plain, *others.values()])
    assert_equal(driver, pipe, [plain])
    base = pipe.scheduler
    seen = [driver.finished["plain"].output]
    for way, (_, make) in OTHERS.items():
        pipe.scheduler = make(base.config)
        assert_equal(driver, pipe, [others[way]])
        assert all(distance(driver.finished[way].output, one) > 2e-3 for one in seen), way
        seen.append(driver.finished[way].output)
    assert max(driver.sharing("plain")) > 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("EulerDiscretScheduler", "did you mean "),
        ("FlowMatchEulerDiscreteSchedule", "did you mean FlowMatchEulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", "goes with the model's FlowMatchEulerDiscreteScheduler"),
        ({"class": "FlowMatchHeunDiscreteScheduler", "shfit": 2.0}, "has no setting 'shfit'; did you mean shift"),
        ({"class": 7}, "noise_scheduler=7"),
    ],
)
async def test_a_noise_scheduler_that_cannot_be_is_refused_before_any_work(given: Any, words: str) -> None:
    engine = AsyncDiffusionEngine.from_pipeline(tiny.sd3())
    async with engine:
        with pytest.raises(InvalidRequest, match=words) as caught:
            await engine.generate("a cat", noise_scheduler=given, **SMALL)
        assert caught.value.field == "noise_scheduler"
        (stats,) = await engine.collective_rpc("stats")
        assert stats.ticks == 0


class Seen:
    """A callback that notes its calls and does something at a step."""

    def __init__(self, act: Any = None) -> None:
        self.calls: list[tuple[str, int, float, list[str]]] = []
        self._act = act

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((type(pipe).__name__, step, float(timestep), sorted(kwargs)))
        return (self._act(pipe, step, kwargs) if self._act else None) or kwargs


def _no_guidance_later(pipe: Any, step: int, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    if step != 1:
        return None
    pipe._guidance_scale = 1.0
    return {name: value.chunk(2)[-1] for name, value in kwargs.items() if name != "latents"}


def _stop(pipe: Any, step: int, kwargs: dict[str, Any]) -> None:
    pipe._interrupt = step >= 1


def _halve(pipe: Any, step: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "latents": kwargs["latents"] * 0.5}


async def _with_callbacks(pipe: Any, callbacks: dict[str, Any], **params: Any) -> dict[str, Any]:
    import asyncio

    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        made = [
            engine.generate("a cat", seed=1, callback_on_step_end=one, output_type="latent", **{**SMALL, **params})
            for one in callbacks.values()
        ]
        return dict(zip(callbacks, await asyncio.gather(*made, return_exceptions=True), strict=True))


@pytest.mark.slow
async def test_callbacks_are_called_as_by_diffusers_and_may_change_the_request() -> None:
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    acts: dict[str, Any] = {"look": None, "guide": _no_guidance_later, "stop": _stop, "halve": _halve}
    params = {"num_inference_steps": 4, "callback_on_step_end_tensor_inputs": inputs, "guidance_scale": 4.0}
    ours = {name: Seen(act) for name, act in acts.items()}
    outs = await _with_callbacks(pipe, ours, **params)
    expected: list[Any] = []
    for name, act in acts.items():
        theirs = Seen(act)
        generator = torch.Generator("cpu").manual_seed(1)
        expected.append(
            pipe("a cat", generator=generator, callback_on_step_end=theirs, output_type="latent", **{**SMALL, **params})
        )
        assert ours[name].calls == theirs.calls
        assert distance(outs[name].output, expected[-1]) <= 1e-4
    assert all(distance(one, expected[0]) > 2e-3 for one in expected[1:])


@pytest.mark.slow
async def test_the_callback_of_older_diffusers_is_called_as_by_diffusers() -> None:
    from conformance import parts_sd
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**parts_sd.parts(parts_sd.ddim()))
    pipe.set_progress_bar_config(disable=True)
    seen: list[list[tuple[int, int, float]]] = [[], []]

    def note(calls: list[tuple[int, int, float]]) -> Any:
        return lambda step, timestep, latents: calls.append((step, int(timestep), round(float(latents.std()), 4)))

    params = {**SMALL, "num_inference_steps": 4, "output_type": "latent", "callback_steps": 2}
    pipe("a cat", generator=torch.Generator("cpu").manual_seed(1), callback=note(seen[0]), **params)
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        await engine.generate("a cat", seed=1, callback=note(seen[1]), **params)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]


async def test_a_callback_that_raises_fails_its_own_request_only() -> None:
    from steploom import GenerationFailed

    def fail(pipe: Any, step: int, kwargs: dict[str, Any]) -> None:
        raise RuntimeError("of the callback's own")

    outs = await _with_callbacks(tiny.sd3(), {"bad": Seen(fail), "good": Seen()})
    assert isinstance(outs["bad"], GenerationFailed)
    assert "of the callback's own" in str(outs["bad"])
    assert outs["good"].output is not None


@pytest.mark.asyncio(loop_scope="session")
async def test_a_callback_cannot_travel_and_the_mend_is_told(mp_engine: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"callback_on_step_end.*inproc") as caught:
        await mp_engine.generate("a cat", callback_on_step_end=Seen(), **SMALL)
    assert caught.value.field == "callback_on_step_end"


@pytest.mark.asyncio(loop_scope="session")
async def test_a_noise_scheduler_travels(mp_engine: Any) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    outs = [
        await mp_engine.generate("a cat", seed=1, noise_scheduler=given, output_type="latent", **SMALL)
        for given in (FlowMatchHeunDiscreteScheduler(shift=3.0), "FlowMatchHeunDiscreteScheduler", None)
    ]
    assert distance(outs[0].output, outs[1].output) == 0
    assert distance(outs[0].output, outs[2].output) > 2e-3
    with pytest.raises(InvalidRequest, match="did you mean FlowMatchHeunDiscreteScheduler"):
        await mp_engine.generate("a cat", noise_scheduler="FlowMatchHeunDiscretScheduler", **SMALL)


def checked_pipeline() -> Any:
    """Stable Diffusion with a safety checker that finds fault with some pictures and not with others."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    tiny.scaled(checker, 1.5, 4)
    pipe = checkpoints.stable_diffusion()
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)
    pipe.register_to_config(requires_safety_checker=True)
    pipe.set_progress_bar_config(disable=True)
    _set_threshold(pipe)
    return pipe


def _set_threshold(pipe: Any) -> None:
    """So that about half of the pictures are above it."""
    checker, scores = pipe.safety_checker, []
    checker.concept_embeds_weights.fill_(2.0)
    hook = checker.visual_projection.register_forward_hook(lambda module, args, out: scores.append(out.clone()))
    for seed in range(6):
        pipe("a cat", generator=torch.Generator("cpu").manual_seed(seed), **SMALL)
    hook.remove()
    embeds = torch.nn.functional.normalize(torch.cat(scores))
    concepts = torch.nn.functional.normalize(checker.concept_embeds)
    highest = (embeds @ concepts.t()).max(dim=1).values.sort().values
    checker.concept_embeds_weights.fill_(float(highest[2] + highest[3]) / 2)
    checker.special_care_embeds_weights.fill_(2.0)


def test_each_request_has_the_safety_checkers_own_verdict() -> None:
    pipe = checked_pipeline()
    requests = [request(f"r{seed}", "a cat", seed, output_type="np", **SMALL) for seed in range(6)]
    requests.append(request("several", "a cat", 9, output_type="np", num_images_per_prompt=3, **SMALL))
    expected = {one.request_id: alone(pipe, one) for one in requests}
    verdicts = [verdict for one in expected.values() for verdict in one.nsfw_content_detected]
    assert True in verdicts
    assert False in verdicts
    driver = Driver(Runner.from_pipeline(pipe, config()))
    finished = driver.drain(requests)
    for one in requests:
        report, reference = finished[one.request_id], expected[one.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert list(report.output.nsfw_content_detected) == list(reference.nsfw_content_detected)
        assert np.abs(report.output.images - reference.images).max() <= 1 / 255
        for image, verdict in zip(report.output.images, report.output.nsfw_content_detected, strict=True):
            assert (np.abs(image).max() == 0) == verdict


@pytest.mark.slow
async def test_the_verdict_travels(tmp_path: Any) -> None:
    pipe = checked_pipeline()
    pipe.save_pretrained(tmp_path)
    expected = [pipe("a cat", generator=torch.Generator("cpu").manual_seed(seed), **SMALL) for seed in range(4)]
    async with AsyncDiffusionEngine(model=str(tmp_path), device="cpu", torch_threads=1) as engine:
        import asyncio

        outs = await asyncio.gather(*(engine.generate("a cat", seed=seed, **SMALL) for seed in range(4)))
    assert [out.output.nsfw_content_detected for out in outs] == [one.nsfw_content_detected for one in expected]


class Forwarding(diffusers.StableDiffusion3Pipeline):
    """One of an application's own, that hands on what it does not know."""

    def __call__(self, *args: Any, brightness: float = 1.0, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_a_pipeline_that_hands_its_arguments_on_takes_those_of_the_one_below() -> None:
    """And each request its seed, which would mean nothing else."""
    pipe = Forwarding.from_pipe(tiny.sd3())
    driver = Driver(Runner.from_pipeline(pipe, config()))
    requests = [latents("a", "a cat", 1, guidance_scale=2.0), latents("b", "a dog", 2, brightness=2.0)]
    driver.drain(requests)
    assert_equal(driver, pipe, requests)
    assert max(driver.sharing("a")) == 2
