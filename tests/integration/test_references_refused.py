"""What of an application comes to its pipeline and cannot be replaced is refused by name, when the engine starts."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
from diffusers.models.attention_processor import JointAttnProcessor2_0
from driving import Driver, config, request
from patching import factor, step_by, with_prompts

from steploom import ConfigError
from steploom.worker.runner import Runner

PIPE: Any = None
INNER: Any = None


@pytest.fixture(autouse=True)
def _nothing_global() -> Iterator[None]:
    yield
    globals().update(PIPE=None, INNER=None)


def generator(pipe: Any) -> None:
    held = (pipe for _ in range(99))
    step_by(pipe, lambda: next(held))


class Service:
    """Its methods know the pipeline by a global name."""

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        return INNER(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def method_that_calls_another(pipe: Any) -> None:
    globals()["INNER"] = pipe.scheduler.step
    pipe.scheduler.step = Service().step


def attribute_of_a_base(pipe: Any) -> None:
    base = type("Base", (), {"pipe": pipe, "__module__": __name__})
    held = type("Derived", (base,), {"__module__": __name__})()
    step_by(pipe, lambda: held.pipe)


def property_of_an_object(pipe: Any) -> None:
    held = type("Mine", (), {"pipe": property(lambda self: pipe), "__module__": __name__})()
    step_by(pipe, lambda: held.pipe)


def imported(pipe: Any) -> None:
    globals()["PIPE"] = pipe
    inner = pipe.scheduler.step

    def step(output: Any, *args: Any, **kwargs: Any) -> Any:
        from test_references_refused import PIPE as own

        return inner(output * factor(own), *args, **kwargs)

    pipe.scheduler.step = step


def too_many_objects(pipe: Any) -> None:
    held = [[object] for _ in range(20_001)]
    pipe.scheduler.step = lambda *args, **kwargs: held and None


def class_of_the_noise_scheduler(pipe: Any) -> None:
    class Patched(type(pipe.scheduler)):
        def step(self, output: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(output * factor(pipe), *args, **kwargs)

    pipe.scheduler.__class__ = Patched


def class_of_the_pipeline(pipe: Any) -> None:
    with_prompts(pipe, lambda self: factor(pipe))


def class_of_an_image_processor(pipe: Any) -> None:
    members = {"postprocess": lambda self, pixels, *args, **kwargs: pixels * factor(pipe), "__module__": __name__}
    cls = type(pipe.image_processor)
    pipe.image_processor.__class__ = type("Mine", (cls,), members)


def hook(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * factor(pipe),))


class Probe:
    """An object of the application that holds the pipeline; its hooks are methods."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.rows = pipe, []

    def note(self, module: Any, args: Any) -> None:
        self.rows.append(len(args))

    def scale(self, module: Any, args: Any, output: Any) -> Any:
        return (output[0] * self._factor,)

    @property
    def _factor(self) -> float:
        return factor(self.pipe)


def hook_that_is_a_method(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(Probe(pipe).scale)


def hook_of_a_block(pipe: Any) -> None:
    scheduler = weakref.proxy(pipe.scheduler)
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args: args if scheduler.step_index else None)


def forward_of(name: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        *path, method = name.split(".")
        part = functools.reduce(getattr, path, pipe)
        inner = getattr(part, method)
        setattr(part, method, lambda *args, **kwargs: inner(*args, **kwargs)[0] * factor(pipe))

    change.__name__ = name
    return change


class Processor(JointAttnProcessor2_0):
    """An attention processor that knows the pipeline."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe = pipe


def attention_processor(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.set_processor(Processor(pipe))


THROUGH = "comes to the pipeline or a part of it through"
ONE = "comes to the pipeline or its noise scheduler: one forward"
CLASS = "comes to the pipeline, or to what each request has its own copy of"
STEPS = {
    generator: "a generator", imported: "an attribute of a module",
}  # fmt: skip
CLASSES = {method_that_calls_another: "Service", attribute_of_a_base: "Derived", property_of_an_object: "Mine"}
REFUSED = {
    **{change: f"pipe.scheduler.step was set on the object, and {THROUGH} {what}:" for change, what in STEPS.items()},
    **{change: f"the class {cls} of pipe.scheduler.step {CLASS}" for change, cls in CLASSES.items()},
    too_many_objects: "pipe.scheduler.step was set on the object, and comes to more than 20000 objects",
    class_of_the_noise_scheduler: f"the class Patched of pipe.scheduler {CLASS}",
    class_of_the_pipeline: f"the class Mine of pipe {CLASS}",
    class_of_an_image_processor: f"the class Mine of pipe.image_processor {CLASS}",
    hook: f"a hook on pipe.transformer (_forward_hooks) {ONE}",
    hook_that_is_a_method: f"a hook on pipe.transformer (_forward_hooks) {ONE}",
    hook_of_a_block: f"a hook on pipe.transformer.transformer_blocks.0 (_forward_pre_hooks) {ONE}",
    attention_processor: f"pipe.transformer.transformer_blocks.0.attn.processor {ONE}",
    **{
        forward_of(name): f"pipe.{name} {ONE}"
        for name in (
            "transformer.forward",
            "transformer.transformer_blocks.0.forward",
            "text_encoder.forward",
            "vae.decode",
        )
    },
}


def refusal_of(pipe: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        Runner.from_pipeline(pipe, config())
    return str(refusal.value)


SLOW = [generator, attribute_of_a_base, too_many_objects, class_of_the_pipeline, hook_of_a_block]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in REFUSED],
    ids=lambda change: change.__name__,
)
def test_it_is_refused_at_start(change: Callable[[Any], None]) -> None:
    sys.modules.setdefault("test_references_refused", sys.modules[__name__])
    pipe = tiny.sd3()
    change(pipe)
    assert refusal_of(pipe).startswith(REFUSED[change])


def test_a_method_of_a_library_that_is_the_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd3()
    inner = type(pipe.scheduler).step

    def step(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, output * factor(pipe), *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    assert refusal_of(pipe).startswith(f"the class {type(pipe.scheduler).__name__} of pipe.scheduler {CLASS}")


def test_what_is_set_later_fails_the_request() -> None:
    pipe = tiny.sd3()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    attention_processor(pipe)
    report = driver.drain([request("r", "a cat", 0, num_inference_steps=2, height=32, width=32)])["r"]
    assert report.error is not None
    assert "pipe.transformer.transformer_blocks.0.attn.processor" in report.error.message


def test_what_a_hook_does_not_read_may_hold_the_pipeline() -> None:
    pipe = tiny.sd3()
    probe = Probe(pipe)
    pipe.transformer.register_forward_pre_hook(probe.note)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    asked = [request(f"r{i}", "a cat", i, num_inference_steps=2, height=32, width=32) for i in range(2)]
    assert all(report.error is None for report in driver.drain(asked).values())
    assert probe.rows
