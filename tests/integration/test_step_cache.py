"""Step caching on real pipelines: who skips leaves the merged forward, and nobody else notices."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import tiny
import torch
from driving import LATENT_TOLERANCE, Driver, alone, assert_cares, config, distance, request
from test_weaving import SMALL, TEXT, picture

from steploom.errors import ConfigError
from steploom.requests import DiffusionRequest
from steploom.weave.forwards.step_cache import StepCache
from steploom.worker.runner import Runner

STEPS = 12
VIDEO = {**SMALL, "num_frames": 5}


def cached(name: str, prompt: str, seed: int, cache: Any, **params: Any) -> DiffusionRequest:
    return request(name, prompt, seed, cache=cache, num_inference_steps=STEPS, **params)


def run(runner: Runner, *requests: DiffusionRequest) -> Driver:
    driver = Driver(runner)
    driver.drain(requests)
    for one in requests:
        report = driver.finished[one.request_id]
        assert report.error is None, report.error and report.error.traceback
    return driver


def skips(driver: Driver, name: str) -> list[int]:
    """In which steps it skipped."""
    counts = [0, *(report.skipped_steps for report in driver.reports[name] if report.stepped)]
    return [step for step, (one, other) in enumerate(itertools.pairwise(counts)) if other > one]


def test_a_threshold_of_0_is_bit_equal_to_none() -> None:
    pipe = tiny.sd3()
    runner = Runner.from_pipeline(pipe, config())
    run(runner, cached("warm", "a cat", 1, None, **TEXT))
    plain = run(runner, cached("a", "a cat", 1, None, **TEXT)).finished["a"]
    for cache in ("easycache:0", "off", {"name": "easycache", "threshold": 0}):
        zero = run(runner, cached("a", "a cat", 1, cache, **TEXT)).finished["a"]
        assert torch.equal(zero.output.images, plain.output.images)
        assert zero.skipped_steps == 0


def test_others_equal_the_pipeline_alone_and_the_batch_shrinks() -> None:
    pipe = tiny.sd3()
    plain = [request(name, name, i, num_inference_steps=STEPS, **TEXT) for i, name in enumerate("ab")]
    expected = {one.request_id: alone(pipe, one) for one in plain}
    assert_cares(expected, LATENT_TOLERANCE)
    runner = Runner.from_pipeline(pipe, config())
    both = [cached("c", "c", 3, "easycache:2", **TEXT), cached("d", "d", 4, "easycache:0.5", **TEXT)]
    run(runner, *plain, *both)  # probing and verification call the module too
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    driver = run(runner, *plain, *both)
    for one in plain:
        assert distance(driver.finished[one.request_id].output, expected[one.request_id]) <= LATENT_TOLERANCE
    skipped = {name: skips(driver, name) for name in "abcd"}
    assert skipped["a"] == skipped["b"] == []
    assert len(skipped["c"]) > len(skipped["d"]) > 2
    assert rows == [2 * (4 - sum(step in skipped[name] for name in "cd")) for step in range(STEPS)]
    assert min(rows) == 4
    # A skip is no denoiser call: it counts in nobody's average.
    assert driver.sharing("a") == [count // 2 for count in rows]
    assert len(driver.sharing("c")) == STEPS - len(skipped["c"])
    assert [report.step for report in driver.reports["c"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("build", "params"),
    [
        (tiny.sd3, TEXT),
        (tiny.flux, TEXT),
        pytest.param(tiny.controlnet, {**SMALL, "image": picture(0)}, marks=pytest.mark.slow),
        pytest.param(tiny.wan, VIDEO, marks=pytest.mark.slow),
    ],
    ids=["sd3", "flux", "controlnet", "wan"],
)
def test_each_decides_as_it_would_alone(build: Any, params: dict[str, Any]) -> None:
    """Different prompts, seeds, guidance and thresholds: what each skips is its own affair."""
    runner = Runner.from_pipeline(build(), config())
    requests = [
        cached("a", "a cat", 1, "easycache:0.7", **params),
        cached("b", "dogs", 2, "easycache:3", guidance_scale=2.0, **params),
        cached("c", "x", 3, {"name": "easycache", "threshold": 3, "warm_up": 0.5}, **params),
    ]
    expected = {one.request_id: run(runner, one) for one in requests}
    together = run(runner, *requests)
    assert_cares({name: driver.finished[name].output for name, driver in expected.items()}, LATENT_TOLERANCE)
    for name, driver in expected.items():
        assert skips(together, name) == skips(driver, name)
        assert distance(together.finished[name].output, driver.finished[name].output) <= LATENT_TOLERANCE
    assert len({tuple(skips(together, name)) for name in "abc"}) == 3
    assert skips(together, "b")[0] < skips(together, "c")[0] == STEPS // 2


def test_a_calm_request_skips_beside_a_wild_one_that_does_not() -> None:
    """Adversarial: the denoiser is made to answer one prompt evenly and the other with noise."""
    pipe = tiny.sd3()

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = kwargs["hidden_states"]
        wild = (x.flatten(1)[:, 0] > 50)[:, None, None, None]  # the latents of the wild one are far away
        return (torch.where(wild, torch.randn(x.shape) * 9, torch.ones_like(x)),)

    pipe.transformer.register_forward_hook(spoil, with_kwargs=True)
    runner = Runner.from_pipeline(pipe, config())
    near = torch.full((1, 4, 4, 4), 1.0)
    requests = [
        cached("calm", "a", 1, "easycache:0.3", latents=near, **TEXT),
        cached("wild", "b", 2, "easycache:0.3", latents=near + 1000, **TEXT),
    ]
    for order in (requests, requests[::-1]):
        driver = run(runner, *order)
        assert skips(driver, "calm") == list(range(2, STEPS - 1))
        assert skips(driver, "wild") == []


def test_the_last_and_the_first_steps_are_computed_under_strength_too() -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = StableDiffusion3Img2ImgPipeline.from_pipe(tiny.sd3())
    driver = run(
        Runner.from_pipeline(pipe, config()),
        cached("a", "a cat", 1, "easycache:1000", image=picture(0), strength=0.7, **TEXT),
    )
    steps = driver.finished["a"].total_steps
    assert steps == 9
    assert skips(driver, "a") == list(range(2, steps - 1))


@pytest.mark.slow
def test_two_denoisers_have_a_warm_up_each() -> None:
    """Wan 2.2: the second expert knows nothing of what the first one answered."""
    from diffusers import WanPipeline

    parts = tiny.wan()
    pipe = WanPipeline(**{**parts.components, "transformer_2": tiny.scaled(tiny.wan().transformer, 1.5, 9)},
                       boundary_ratio=0.7)  # fmt: skip
    calls: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    runner = Runner.from_pipeline(pipe, config())
    run(runner, cached("warm", "a cat", 1, None, **VIDEO))
    first = calls.count("transformer") // 2
    calls.clear()
    plain = run(runner, cached("a", "a cat", 1, None, **VIDEO))
    first = calls.count("transformer") // 2
    calls.clear()
    driver = run(runner, cached("a", "a cat", 1, "easycache:1000", **VIDEO))
    assert 3 < first < STEPS - 3
    assert skips(driver, "a") == [*range(2, first), *range(first + 2, STEPS - 1)]
    assert calls == ["transformer"] * 4 + ["transformer_2"] * 6  # two calls a step
    assert distance(driver.finished["a"].output, plain.finished["a"].output) > 0


@pytest.mark.slow
def test_the_controlnet_of_a_skipped_step_does_not_run_either() -> None:
    pipe = tiny.controlnet()
    runner = Runner.from_pipeline(pipe, config())
    run(runner, cached("warm", "a cat", 1, None, image=picture(0), **SMALL))
    calls = {"controlnet": 0, "unet": 0}
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    driver = run(runner, cached("a", "a cat", 1, "easycache:1000", image=picture(0), **SMALL))
    assert calls == {"controlnet": 3, "unet": 3}
    assert len(skips(driver, "a")) == STEPS - 3


def tensors_of(cache: StepCache) -> dict[int, torch.Tensor]:
    held = [*cache._input, *cache._anchor]
    for place in cache._places.values():
        held += [*place._outputs, *(change for change in place._changes if change is not None)]
    return {id(tensor): tensor for tensor in held}


@pytest.mark.slow
def test_memory_is_a_few_tensors_and_is_freed_when_the_request_goes() -> None:
    runner = Runner.from_pipeline(tiny.sd3(), config())
    driver = Driver(runner)
    driver.tick([cached(name, name, i, "easycache:2", **TEXT) for i, name in enumerate("ab")])
    held: dict[str, dict[int, Any]] = {}
    for _ in range(STEPS - 4):
        driver.tick()
        for name in "ab":
            tensors = tensors_of(runner._residents[name].program.step_cache)
            assert 3 <= len(tensors) <= 4
            assert {tensor.shape for tensor in tensors.values()} == {(2, 4, 16, 16)}
            held[name] = {key: weakref.ref(tensor) for key, tensor in tensors.items()}
    del tensors
    program = runner._residents["a"].program
    driver.cancel("a")
    driver.tick()
    gc.collect()
    assert program.step_cache is None
    assert all(reference() is None for reference in held["a"].values())
    resident = runner._residents["b"].program
    driver.drain()
    assert resident.step_cache is None


def test_a_default_of_the_engine_is_for_those_who_do_not_say() -> None:
    runner = Runner.from_pipeline(tiny.sd3(), config(cache="easycache:1000"))
    driver = run(
        runner,
        cached("default", "a", 1, None, **TEXT),
        cached("off", "b", 2, "off", **TEXT),
        cached("own", "c", 3, {"name": "easycache", "threshold": 1000, "warm_up": 0.5}, **TEXT),
    )
    assert skips(driver, "off") == []
    assert skips(driver, "own") == list(range(6, STEPS - 1))
    assert skips(driver, "default") == list(range(2, STEPS - 1))


def test_previews_and_trajectories_have_skipped_steps_too() -> None:
    runner = Runner.from_pipeline(tiny.sd3(), config())
    one = DiffusionRequest("a", request_id="a", seed=1, output_type="latent", cache="easycache:1000", preview_every=1,
                           return_trajectory=True, latents_every=1, num_inference_steps=STEPS, **TEXT)  # fmt: skip
    driver = run(runner, one)
    assert len(driver.finished["a"].trajectory_latents) == STEPS
    steps = [report for report in driver.reports["a"] if report.stepped]
    assert all(report.preview is not None and report.latents is not None for report in steps)
    assert torch.equal(steps[-1].latents, driver.finished["a"].output.images)


def test_a_language_model_has_no_default_step_cache() -> None:
    from tiny_language import llada

    with pytest.raises(ConfigError, match="leave it None"):
        Runner.from_pipeline(llada(), config(cache="easycache"))
