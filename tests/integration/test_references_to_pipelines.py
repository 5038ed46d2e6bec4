"""What of an application comes to its pipeline is found: it means each request's own, or is refused."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request
from patching import factor, step_by, with_prompts

from steploom.worker.runner import Runner


def step_of_self(pipe: Any, own: Callable[[Any], Any]) -> None:
    def step(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).step(self, output * factor(own(self)), *args, **kwargs)

    pipe.scheduler.step = types.MethodType(step, pipe.scheduler)


# Served: it means the request's own.


def nine_wrappers(pipe: Any) -> None:
    for _ in range(12):
        inner = pipe.scheduler.step

        @functools.wraps(inner)
        def step(output: Any, *args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            return _inner(output * 0.99, *args, **kwargs)

        pipe.scheduler.step = step


def long_history(pipe: Any) -> None:
    history = [(i, i * 0.5) for i in range(25_000)]
    for _ in range(2):
        inner = pipe.scheduler.step

        def step(output: Any, *args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            history.append((0, 1.0))
            return _inner(output * 0.9, *args, **kwargs)

        pipe.scheduler.step = step


def proxy_of_the_pipeline(pipe: Any) -> None:
    proxy = weakref.proxy(pipe)
    step_by(pipe, lambda: proxy)


def reference_to_the_pipeline(pipe: Any) -> None:
    weak = weakref.ref(pipe)
    step_of_self(pipe, lambda _: weak())


def proxy_of_the_noise_scheduler(pipe: Any) -> None:
    proxy, step = weakref.proxy(pipe.scheduler), type(pipe.scheduler).step
    pipe.scheduler.step = lambda output, *args, **kwargs: step(proxy, output * 0.9, *args, **kwargs)


def owner(pipe: Any) -> None:
    pipe.scheduler.owner = pipe
    step_of_self(pipe, lambda self: self.owner)


def weak_owner(pipe: Any) -> None:
    pipe.scheduler.owner = weakref.ref(pipe)
    step_of_self(pipe, lambda self: self.owner())


def proxy_owner(pipe: Any) -> None:
    pipe.scheduler.owner = weakref.proxy(pipe)
    step_of_self(pipe, lambda self: self.owner)


class Helper:
    """Has a back reference."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def factor(self) -> float:
        return factor(self.pipe)

    def __call__(self) -> float:
        return factor(self.pipe)


def subclass_by_self(pipe: Any) -> None:
    with_prompts(pipe, factor)


def helper(pipe: Any) -> None:
    with_prompts(pipe, lambda self: self.helper.factor())
    pipe.helper = Helper(pipe)


def callable_helper_in_a_list(pipe: Any) -> None:
    with_prompts(pipe, lambda self: self.helpers[0]())
    pipe.helpers = [Helper(pipe)]


def helper_of_the_noise_scheduler(pipe: Any) -> None:
    pipe.scheduler.helper = Helper(pipe)
    step_of_self(pipe, lambda self: self.helper.pipe)


def hook_by_itself(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0.9,))


SERVED = [nine_wrappers, long_history, proxy_of_the_pipeline, reference_to_the_pipeline, proxy_of_the_noise_scheduler,
          owner, weak_owner, proxy_owner, subclass_by_self, helper, callable_helper_in_a_list,
          helper_of_the_noise_scheduler, hook_by_itself]  # fmt: skip
FAST = [proxy_of_the_pipeline, owner, helper]


@pytest.mark.parametrize(
    "change",
    [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in SERVED],
    ids=lambda change: change.__name__,
)
def test_it_means_the_requests_own(change: Callable[[Any], None]) -> None:
    pipe, served = tiny.sd3(), tiny.sd3()
    change(pipe)
    change(served)
    common = {"num_inference_steps": 2, "height": 32, "width": 32}
    asked = [request(f"r{i}", "a cat", i, guidance_scale=4.0 + i, **common) for i in range(2)]
    driver = Driver(Runner.from_pipeline(served, config()))
    reports = driver.drain(asked)
    for one in asked:
        assert reports[one.request_id].error is None, reports[one.request_id].error
        assert distance(reports[one.request_id].output, alone(pipe, one)) <= 1e-4, one.request_id
    assert max(driver.sharing("r1")) >= 2


def test_weights_are_not_copied_with_a_noise_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd3()
    owner(pipe)
    copied: list[Any] = []
    plain = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(1) or plain(self, memo))
    Driver(Runner.from_pipeline(pipe, config())).drain(
        [request("r", "a cat", 0, num_inference_steps=2, height=32, width=32)]
    )
    assert not copied
