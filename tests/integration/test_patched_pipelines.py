"""Functions that an application sets on its pipeline, or on a component that requests have copies of."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Img2ImgPipeline
from driving import Driver, alone, config, distance, request
from PIL import Image

from steploom import ConfigError
from steploom.worker.runner import Runner

PIPE: Any = None
INNER: Any = None
COUNT = 0
LOG: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_global() -> Iterator[None]:
    globals().update(PIPE=None, INNER=None, COUNT=0)
    LOG.clear()
    yield
    globals().update(PIPE=None, INNER=None)


def lambda_over_the_method(pipe: Any) -> None:
    inner = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: inner(output * 0.9, *args, **kwargs)


def default_value(pipe: Any) -> None:
    pipe.scheduler.step = lambda output, *args, _inner=pipe.scheduler.step, **kwargs: _inner(
        output * 0.9, *args, **kwargs
    )


def global_name(pipe: Any) -> None:
    globals()["INNER"] = pipe.scheduler.step

    @functools.wraps(pipe.scheduler.step)
    def step(output: Any, *args: Any, **kwargs: Any) -> Any:
        LOG.append("step")
        return INNER(output * 0.9, *args, **kwargs)

    pipe.scheduler.step = step


def _scaled(output: Any) -> Any:
    return output * (0.9 if PIPE.scheduler.sigmas is not None and len(PIPE.scheduler.timesteps) < 5 else 0.5)


def global_pipeline(pipe: Any) -> None:
    globals().update(PIPE=pipe, INNER=pipe.scheduler.step)
    pipe.scheduler.step = lambda output, *args, **kwargs: INNER(_scaled(output), *args, **kwargs)


def partial(pipe: Any) -> None:
    def step(inner: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(output * 0.9, *args, **kwargs)

    pipe.scheduler.step = functools.partial(step, pipe.scheduler.step)


def wraps_twice(pipe: Any) -> None:
    for _ in range(2):
        inner = pipe.scheduler.step

        @functools.wraps(inner)
        def step(output: Any, *args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            return _inner(output * 0.95, *args, **kwargs)

        pipe.scheduler.step = step


def no_gradients(pipe: Any) -> None:
    lambda_over_the_method(pipe)
    pipe.scheduler.step = torch.no_grad()(pipe.scheduler.step)


def compiled(pipe: Any) -> None:
    lambda_over_the_method(pipe)
    pipe.scheduler.step = torch.compile(pipe.scheduler.step, backend="eager")


def bound_to_it(pipe: Any) -> None:
    def step(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).step(self, output * 0.9, *args, **kwargs)

    pipe.scheduler.step = types.MethodType(step, pipe.scheduler)


def set_timesteps(pipe: Any) -> None:
    inner = pipe.scheduler.set_timesteps

    def halved(*args: Any, sigmas: Any = None, **kwargs: Any) -> None:
        inner(*args, sigmas=sigmas, **kwargs)
        pipe.scheduler.sigmas = pipe.scheduler.sigmas * 0.9

    pipe.scheduler.set_timesteps = halved


def encode_prompt(pipe: Any) -> None:
    inner = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: [None if one is None else one * 0.5 for one in inner(*args, **kwargs)]


def image_processor(pipe: Any) -> None:
    inner = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda *args, **kwargs: (
        inner(*args, **kwargs) * float(len(pipe.scheduler.timesteps))
    )


def bound_to_the_pipeline(pipe: Any) -> None:
    cls = type(pipe)

    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._prepared = True
        return cls.prepare_latents(self, *args, **kwargs) * 0.9

    pipe.prepare_latents = types.MethodType(prepare_latents, pipe)


def tokenizer(pipe: Any) -> None:
    inner = pipe.tokenizer.pad

    def pad(*args: Any, **kwargs: Any) -> Any:
        LOG.append(pipe.tokenizer.padding_side)
        return inner(*args, **kwargs)

    pipe.tokenizer.pad = pad


STEPS = [lambda_over_the_method, default_value, global_name, global_pipeline, partial, wraps_twice, no_gradients]
OTHERS = [bound_to_it, set_timesteps, encode_prompt, bound_to_the_pipeline, tokenizer, compiled]
FAST = [global_pipeline, set_timesteps]


def requests(**more: Any) -> list[Any]:
    common = {"height": 32, "width": 32, **more}
    return [
        request(f"r{i}", f"a cat{' of' * i}", i, num_inference_steps=2 + i, guidance_scale=(1.0, 4.0, 5.0)[i], **common)
        for i in range(3)
    ]


_INSTALLED = "_output_capturing_hooks_installed"
"""By transformers' models themselves, at their first call."""


def state(pipe: Any) -> list[tuple[int, str, Any]]:
    """What there is of a pipeline, as far as a request could change it."""
    held = [pipe, pipe.scheduler, pipe.tokenizer, pipe.image_processor]
    for module in (one for one in vars(pipe).values() if isinstance(one, torch.nn.Module)):
        held += module.modules()
    return [
        (i, name, id(value)) for i, one in enumerate(held) for name, value in vars(one).items() if name != _INSTALLED
    ]


def assert_serves(pipe: Any, asked: list[Any], expected: dict[str, Any]) -> None:
    before = state(pipe)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    reports = driver.drain(asked)
    for one in asked:
        assert reports[one.request_id].error is None, reports[one.request_id].error
        assert distance(reports[one.request_id].output, expected[one.request_id]) <= 1e-4, one.request_id
    assert max(driver.sharing("r1")) >= 2
    assert state(pipe) == before


@pytest.mark.parametrize(
    "change",
    [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in (*STEPS, *OTHERS)],
    ids=lambda change: change.__name__,
)
def test_it_is_served_as_by_the_pipeline_alone(change: Callable[[Any], None]) -> None:
    used, asked = tiny.sd3(), requests()
    plain = alone(used, asked[1])
    change(used)
    expected = {one.request_id: alone(used, one) for one in asked}
    assert change is tokenizer or distance(expected["r1"], plain) > 1e-3, "it does not matter"
    assert_serves(used, asked, expected)
    fresh = tiny.sd3()
    change(fresh)
    assert_serves(fresh, asked, expected)


def test_an_image_processor() -> None:
    pipe, asked = tiny.sd3(), requests(output_type="pt")
    image_processor(pipe)
    expected = {one.request_id: alone(pipe, one) for one in asked}
    assert_serves(pipe, asked, expected)


def test_what_it_logs_is_the_applications() -> None:
    pipe = tiny.sd3()
    global_name(pipe)
    Driver(Runner.from_pipeline(pipe, config())).drain(requests())
    assert len(LOG) == 2 + 3 + 4


PAG = ["pipe._apply_perturbed_attention_guidance", "pipe.prepare_latents", "pipe.unet.set_attn_processor"]


@pytest.mark.parametrize(
    "where", ["pipe._set_pag_attn_processor", *(pytest.param(one, marks=pytest.mark.slow) for one in PAG)]
)
def test_a_pipeline_that_changes_its_modules(where: str) -> None:
    pipe = tiny.sdxl_pag()
    *_, owner, name = where.split(".")
    holder = pipe if owner == "pipe" else pipe.unet
    inner, asked = getattr(holder, name), requests(pag_scale=2.0)
    expected = {one.request_id: alone(pipe, one) for one in asked}
    setattr(holder, name, lambda *args, **kwargs: inner(*args, **kwargs))
    assert_serves(pipe, asked, expected)


def test_what_a_step_calls_is_called() -> None:
    """Steps of several requests are taken together, which calls none of the methods of their noise schedulers."""
    pipe = tiny.sdxl()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    inner, asked = pipe.scheduler.convert_model_output, requests()
    plain = alone(pipe, asked[1])
    pipe.scheduler.convert_model_output = lambda *args, **kwargs: inner(*args, **kwargs) * 0.5
    expected = {one.request_id: alone(pipe, one) for one in asked}
    assert distance(expected["r1"], plain) > 1e-3
    assert_serves(pipe, asked, expected)


def test_a_pipeline_of_the_family() -> None:
    pipe, picture = tiny.sd3(), Image.linear_gradient("L").convert("RGB").resize((32, 32))
    global_pipeline(pipe)
    given = {"image": picture, "strength": 0.9, "num_inference_steps": 4}
    asked = [request(f"r{i}", "a cat", i, task="image-to-image", guidance_scale=3.0 + i, **given) for i in range(2)]
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    expected = {one.request_id: alone(other, one) for one in asked}
    assert_serves(pipe, asked, expected)


def weakly(pipe: Any) -> None:
    inner = weakref.WeakMethod(pipe.scheduler.step)
    pipe.scheduler.step = lambda *args, **kwargs: inner()(*args, **kwargs)


def within_a_module(pipe: Any) -> None:
    module = globals()["INNER"] = types.ModuleType("theirs")
    vars(module)["inner"] = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: INNER.inner(*args, **kwargs)


def counts_in_a_global(pipe: Any) -> None:
    globals()["INNER"] = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        global COUNT
        COUNT += 1
        return INNER(*args, **kwargs)

    pipe.scheduler.step = step


def cached(pipe: Any) -> None:
    pipe.encode_prompt = functools.cache(pipe.encode_prompt)


REFUSED = {
    weakly: ("scheduler.step", "a WeakMethod"),
    within_a_module: ("scheduler.step", "an attribute of a module"),
    counts_in_a_global: ("scheduler.step", "a function that sets 'COUNT', a name of its surroundings"),
    cached: ("encode_prompt", "a _lru_cache_wrapper"),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_it_is_refused_at_start(change: Callable[[Any], None]) -> None:
    pipe = tiny.sd3()
    change(pipe)
    name, through = REFUSED[change]
    with pytest.raises(ConfigError) as refusal:
        Runner.from_pipeline(pipe, config())
    said = str(refusal.value)
    words = "was set on the object, and comes to the pipeline or a part of it through"
    assert said.startswith(f"pipe.{name} {words} {through}:")
    assert f"types.MethodType(f, pipe{'.scheduler' if 'scheduler' in name else ''})" in said


def test_one_that_is_set_later_fails_the_request() -> None:
    pipe = tiny.sd3()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    weakly(pipe)
    report = driver.drain(requests()[:1])["r0"]
    assert report.error is not None
    assert "pipe.scheduler.step was set on the object" in report.error.message
