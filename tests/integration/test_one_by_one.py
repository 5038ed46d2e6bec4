"""Pipelines whose requests may not run together: the application's own code holds a lock, or keeps something."""

from __future__ import annotations

import dataclasses
import threading
import types
from typing import Any

import anyio
import pytest
import tiny
from diffusers import StableDiffusion3Pipeline
from driving import alone, distance, request

from steploom import AsyncDiffusionEngine, DiffusionOutput, DiffusionRequest, StepEvent

SMALL = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
GLOBAL = threading.Lock()


class Guard:
    def __init__(self) -> None:
        self.inner = threading.Lock()

    def __enter__(self) -> None:
        self.inner.acquire()

    def __exit__(self, *fault: Any) -> None:
        self.inner.release()


def on_itself(pipe: Any) -> None:
    class Locked(StableDiffusion3Pipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with self.lock:
                return super().__call__(*args, **kwargs)

    pipe.__class__, pipe.lock = Locked, threading.Lock()


def around_it(pipe: Any) -> None:
    class Locked(StableDiffusion3Pipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with GLOBAL:
                return super().__call__(*args, **kwargs)

    pipe.__class__ = Locked


def in_a_helper(pipe: Any) -> None:
    guard = Guard()

    class Locked(StableDiffusion3Pipeline):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            with guard:
                return super().encode_prompt(*args, **kwargs)

    pipe.__class__ = Locked


def around_a_step(pipe: Any) -> None:
    lock, inner = threading.Lock(), pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return inner(*args, **kwargs)

    pipe.scheduler.step = step


def hook(pipe: Any) -> None:
    seen = {"n": 0}

    def weaker(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        seen["n"] = 1 if kwargs["timestep"][0] >= 999 else seen["n"] + 1
        return (output[0] * (0.9 if seen["n"] % 2 else 0.6),)

    pipe.transformer.register_forward_hook(weaker, with_kwargs=True)


async def drawn(engine: AsyncDiffusionEngine, *asked: DiffusionRequest) -> list[DiffusionOutput]:
    """All of them, at once."""
    outputs = dict[str, DiffusionOutput]()

    async def draw(one: DiffusionRequest) -> None:
        outputs[one.request_id] = await engine.generate(one)

    with anyio.fail_after(100):
        async with anyio.create_task_group() as group:
            for one in asked:
                group.start_soon(draw, one)
    return [outputs[one.request_id] for one in asked]


@pytest.mark.parametrize("change", [on_itself, around_it, in_a_helper, around_a_step], ids=lambda f: f.__name__)
async def test_a_lock_that_one_request_holds_keeps_no_other_for_ever(change: Any) -> None:
    pipe, other = tiny.sd3(), tiny.sd3()
    change(pipe)
    asked = [request(f"r{i}", "a cat" + " of" * i, i, **SMALL) for i in range(3)]
    expected = [alone(other, one) for one in asked]
    async with AsyncDiffusionEngine.from_pipeline(pipe, costs_file=None) as engine:
        outputs = await drawn(engine, *asked)
    for output, own in zip(outputs, expected, strict=True):
        assert distance(output.output, own) <= 1e-4


def in_a_dict(pipe: Any) -> None:
    class Own(StableDiffusion3Pipeline):
        def __call__(self, prompt: Any, **kwargs: Any) -> Any:
            self.state["prompt"] = prompt
            return super().__call__(prompt, **kwargs)

        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_latents(*args, **kwargs) * len(self.state["prompt"])

    pipe.__class__, pipe.state = Own, {}


def in_a_helper_object(pipe: Any) -> None:
    in_a_dict(pipe)

    class Own(StableDiffusion3Pipeline):
        def __call__(self, prompt: Any, **kwargs: Any) -> Any:
            self.state.prompt = prompt
            return super().__call__(prompt, **kwargs)

        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_latents(*args, **kwargs) * len(self.state.prompt)

    pipe.__class__, pipe.state = Own, types.SimpleNamespace()


def in_a_closure_of_the_step(pipe: Any) -> None:
    inner, calls = pipe.scheduler.step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (inner(*args, **kwargs)[0] * (0.9 if calls % 2 else 0.6),)

    pipe.scheduler.step = step


def in_a_table(pipe: Any) -> None:
    class Own(StableDiffusion3Pipeline):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            if prompt not in self.table:
                self.table[prompt] = super().encode_prompt(prompt, *args, **kwargs)
            return self.table[prompt]

    pipe.__class__, pipe.table = Own, {}


def on_itself_only(pipe: Any) -> None:
    class Own(StableDiffusion3Pipeline):
        def __call__(self, prompt: Any, **kwargs: Any) -> Any:
            self.prompt = prompt
            return super().__call__(prompt, **kwargs)

        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_latents(*args, **kwargs) * len(self.prompt)

    pipe.__class__ = Own


KEEPING = [(in_a_dict, False), (in_a_helper_object, False), (in_a_closure_of_the_step, False), (in_a_table, True),
           (on_itself_only, True)]  # fmt: skip


@pytest.mark.parametrize(("change", "together"), KEEPING, ids=lambda one: getattr(one, "__name__", str(one)))
async def test_what_a_pipelines_own_methods_keep_in_common(change: Any, together: bool) -> None:
    pipe, other = tiny.sd3(), tiny.sd3()
    change(pipe)
    change(other)
    asked = [request(f"r{i}", "a cat" + " of" * i, i, **SMALL) for i in range(3)]
    expected = [alone(other, one) for one in asked]
    async with AsyncDiffusionEngine.from_pipeline(pipe, costs_file=None) as engine:
        outputs = await drawn(engine, *asked)
    for output, own in zip(outputs, expected, strict=True):
        assert distance(output.output, own) <= 1e-4
    assert (max(output.timings.mean_batch_requests for output in outputs) > 1) is together


POLICIES = [{}, {"preempt": True, "max_batch": 1}, {"max_resident": 2, "max_batch": 2}, {"policy": "srpt"}]


@pytest.mark.parametrize("change", [on_itself, hook], ids=lambda f: f.__name__)
@pytest.mark.parametrize("own", POLICIES, ids=str)
async def test_who_is_cancelled_or_urgent_stands_in_nobodys_way(change: Any, own: dict[str, Any]) -> None:
    pipe, other = tiny.sd3(), tiny.sd3()
    change(pipe)
    if change is hook:
        hook(other)
    long = request("long", "a cat", 1, **SMALL | {"num_inference_steps": 60})
    asked = [request(f"r{i}", "a dog", i, **SMALL) for i in range(3)]
    expected = [alone(other, one) for one in asked]
    urgent = [dataclasses.replace(one, priority=-1) for one in asked]
    async with AsyncDiffusionEngine.from_pipeline(pipe, costs_file=None, **own) as engine:
        async with engine.stream(long) as stream:
            steps = (event async for event in stream if isinstance(event, StepEvent) and event.step >= 2)
            await anext(steps)
            async with anyio.create_task_group() as group:
                group.start_soon(drawn, engine, *urgent)
                await anext(steps)
                await engine.abort("long")
        outputs = await drawn(engine, *(request(f"{i} again", "a dog", i, **SMALL) for i in range(3)))
    for output, expects in zip(outputs, expected, strict=True):
        assert distance(output.output, expects) <= 1e-4
