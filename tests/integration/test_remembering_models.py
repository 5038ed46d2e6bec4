"""Models in which the application's code keeps something from call to call: each request has that to itself."""

from __future__ import annotations

import functools
import time
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel
from driving import Driver, alone, config, distance, request

from steploom.worker.runner import Runner

SMALL = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
FORWARD = SD3Transformer2DModel.forward
SCALES, TABLE = [0.9, 0.8], {1: "first", 2: "second"}


def _tea(self: Any, hidden_states: Any = None, **kwargs: Any) -> Any:
    """TeaCache, in short: every second step takes the last residual."""
    computes = self.cnt % 2 == 0
    self.cnt = (self.cnt + 1) % 4
    if computes:
        out = FORWARD(self, hidden_states=hidden_states, **kwargs)[0]
        self.previous_residual = out - hidden_states
    return (hidden_states + self.previous_residual,)


def _in_dict(self: Any, hidden_states: Any = None, **kwargs: Any) -> Any:
    """The same, in what is in a dict of the module."""
    self.kept["n"] += 1
    if self.kept["n"] % 2:
        self.kept["residual"] = FORWARD(self, hidden_states=hidden_states, **kwargs)[0] - hidden_states
    return (hidden_states + self.kept["residual"],)


def class_level(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SD3Transformer2DModel, "forward", _tea)
    patch.setattr(SD3Transformer2DModel, "cnt", 0, raising=False)


def subclass(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.__class__ = type("Tea", (SD3Transformer2DModel,), {"forward": _tea})
    model.cnt = 0


def instance(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.forward, model.cnt = types.MethodType(_tea, model), 0


def closure(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.forward, model.cnt = lambda *args, **kwargs: _tea(model, *args, **kwargs), 0


def in_dict(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.__class__ = type("Tea", (SD3Transformer2DModel,), {"forward": _in_dict})
    model.kept = {"n": 0}


def hook(model: Any, patch: pytest.MonkeyPatch) -> None:
    def weaker(module: Any, args: Any, output: Any) -> Any:
        module.calls = getattr(module, "calls", 0) + 1
        return (output[0] * (0.9 if module.calls % 2 else 0.6),)

    model.register_forward_hook(weaker)


def assert_equal(pipe: Any, asked: list[Any], expected: list[Any], *, alone_for: str) -> None:
    """Requests that join one after another give what was expected, and share no call, for that reason."""
    runner = Runner.from_pipeline(pipe, config())
    finished = Driver(runner).drain(asked, joining=1)
    for one, own in zip(asked, expected, strict=True):
        report = finished[one.request_id]
        assert report.error is None, report.error.traceback
        assert distance(report.output, own) <= 1e-4
    assert any(alone_for in reason for reason in runner.stats().alone_calls)


@pytest.mark.parametrize("change", [class_level, subclass, instance, closure, in_dict, hook], ids=lambda f: f.__name__)
def test_each_request_has_what_is_kept_on_the_module_to_itself(
    change: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.sd3()
    change(pipe.transformer, monkeypatch)
    asked = [request(f"r{i}", "a cat" + " of" * i, i, **SMALL) for i in range(2)]
    expected = [alone(pipe, one) for one in asked]  # after four steps, its state is as it was at the start
    assert_equal(pipe, asked, expected, alone_for="on the module from call to call")


def _counting(model: Any) -> None:
    seen = {"n": 0}

    def weaker(module: Any, args: Any, output: Any) -> Any:
        seen["n"] += 1
        return (output[0] * (0.9 if seen["n"] % 2 else 0.6),)

    model.register_forward_hook(weaker)


def _caching(model: Any) -> None:
    block, calls, last = model.transformer_blocks[1], 0, None
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, last
        calls += 1
        if calls % 2 or last is None:
            last = inner(*args, **kwargs)
        return last

    block.forward = forward


class _State:
    n = 0


def _in_object(model: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.state.n += 1
        return (FORWARD(self, *args, **kwargs)[0] * (0.9 if self.state.n % 2 else 0.6),)

    model.__class__ = type("Tea", (SD3Transformer2DModel,), {"forward": forward})
    model.state = _State()


class _Tea:
    """The same, in a helper."""

    def __init__(self) -> None:
        self.step, self.last = 0, None

    def mix(self, out: Any) -> Any:
        self.step += 1
        if self.step % 2 == 0:
            out = 0.5 * out + 0.5 * self.last
        self.last = out
        return out


def _with_helper(model: Any) -> None:
    model.tea = _Tea()
    model.forward = types.MethodType(
        lambda self, *args, **kwargs: (self.tea.mix(FORWARD(self, *args, **kwargs)[0]),), model
    )


class _Forward(_Tea):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.mix(self.inner(*args, **kwargs)[0]),)


def _callable_object(model: Any) -> None:
    model.forward = _Forward(model.forward)


class _Hook(_Tea):
    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return (self.mix(output[0]),)

    def directly(self, module: Any, args: Any, output: Any) -> Any:
        self.step += 1
        out = output[0] if self.step % 2 else 0.5 * output[0] + 0.5 * self.last
        self.last = out
        return (out,)


def _hook_object(model: Any) -> None:
    model.register_forward_hook(_Hook())


def _hook_method(model: Any) -> None:
    model.register_forward_hook(_Hook().directly)


def _partial(model: Any) -> None:
    def weaker(store: Any, module: Any, args: Any, output: Any) -> Any:
        store["n"] = store.get("n", 0) + 1
        return (output[0] * (0.9 if store["n"] % 2 else 0.6),)

    model.register_forward_hook(functools.partial(weaker, {}))


def _by_name(model: Any) -> None:
    def weaker(module: Any, args: Any, output: Any) -> Any:
        setattr(module, "calls", getattr(module, "calls", 0) + 1)  # noqa: B010 - as it is written
        return (output[0] * (0.9 if getattr(module, "calls") % 2 else 0.6),)  # noqa: B009

    model.register_forward_hook(weaker)


def _alias(model: Any) -> None:
    history, inner = deque[Any](maxlen=2), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        h = history
        h.append(len(h))
        return (inner(*args, **kwargs)[0] * (0.9 if h[-1] % 2 else 0.6) ** len(h),)

    history.extend((0, 1))
    model.forward = forward


def _buffer(model: Any) -> None:
    model.register_buffer("count", torch.zeros(1))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return (FORWARD(self, *args, **kwargs)[0] * (0.9 if self.count % 2 else 0.6),)

    model.forward = types.MethodType(forward, model)


class _Processor:
    def __init__(self, inner: Any) -> None:
        self.inner, self.step = inner, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        return tuple(out * (0.9 if self.step % 2 else 0.6) for out in self.inner(*args, **kwargs))


def _processors(model: Any) -> None:
    processor = model.transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_processor(_Processor(processor))


ELSEWHERE = [_counting, _caching, _in_object, _with_helper, _callable_object, _hook_object, _hook_method, _partial,
             _by_name, _alias, _buffer, _processors]  # fmt: skip


@pytest.mark.parametrize("change", ELSEWHERE, ids=lambda f: f.__name__)
def test_where_it_is_kept_elsewhere_requests_run_one_after_another(change: Callable[[Any], None]) -> None:
    pipe, other = tiny.sd3(), tiny.sd3()
    for one in (pipe, other):
        change(one.transformer)
    asked = [request(f"r{i}", "a cat" + " of" * i, i, **SMALL) for i in range(3)]
    expected = [alone(other, one) for one in asked]  # after four steps, its state is as it was at the start
    assert_equal(pipe, asked, expected, alone_for="from call to call")


def _stateless(model: Any, seen: list[Any]) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = FORWARD(self, *args, **kwargs)
        seen.append(len(args))
        return (out[0] * 0.5, *out[1:])

    model.__class__ = type("Halved", (SD3Transformer2DModel,), {"forward": forward})


def _logging(model: Any, seen: list[Any]) -> None:
    count = {"calls": 0}

    def note(module: Any, args: Any, output: Any) -> None:
        count["calls"] += 1
        if count["calls"] < 10**6:
            seen.append(count["calls"])

    model.register_forward_hook(note)


def _tallying(model: Any, seen: list[Any]) -> None:
    count = {"calls": 0}
    model.register_forward_pre_hook(lambda *_: count.update(calls=count["calls"] + 1))
    model.register_forward_hook(lambda *_: seen.append(count["calls"]))


def _averaging(model: Any, seen: list[Any]) -> None:
    st, inner = {"n": 0, "total": 0.0}, model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = inner(*args, **kwargs)
        st["n"] += 1
        st["total"] += time.perf_counter() - began
        seen.append(1)
        return out

    model.forward = forward


def _noting(model: Any, seen: list[Any]) -> None:
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.last_shape = hidden_states.shape
        self.calls += 1
        seen.append(1)
        for layer, scale in zip(self.scaled, SCALES, strict=True):
            hidden_states = hidden_states * scale if layer in TABLE else hidden_states
        return FORWARD(self, hidden_states, *args, **kwargs)

    model.calls, model.scaled = 0, [1, 2]
    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("change", [_stateless, _logging, _tallying, _averaging, _noting], ids=lambda f: f.__name__)
def test_code_that_keeps_nothing_that_counts_is_shared(change: Callable[[Any, list[Any]], None]) -> None:
    pipe, seen = tiny.sd3(), list[Any]()
    change(pipe.transformer, seen)
    asked = [request(f"r{i}", "a cat", i, **SMALL | {"num_inference_steps": 2}) for i in range(2)]
    expected = [alone(pipe, one) for one in asked]
    driver = Driver(Runner.from_pipeline(pipe, config()))
    finished = driver.drain(asked)
    assert seen
    assert driver.sharing("r0") == [2, 2]
    for one, own in zip(asked, expected, strict=True):
        assert distance(finished[one.request_id].output, own) <= 1e-4


@pytest.mark.parametrize("change", [class_level, hook], ids=lambda f: f.__name__)
def test_what_is_set_while_the_engine_runs_is_taken_up(
    change: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, other = tiny.sd3(), tiny.sd3()  # a direct call of the first would leave its traces there
    driver = Driver(Runner.from_pipeline(pipe, config()))
    assert driver.drain([request("before", "a cat", 0, **SMALL)])["before"].error is None
    change(pipe.transformer, monkeypatch)
    change(other.transformer, monkeypatch)
    asked = [request(f"r{i}", "a cat" + " of" * i, i, **SMALL) for i in range(2)]
    expected = [alone(other, one) for one in asked]
    finished = driver.drain(asked, joining=1)
    for one, own in zip(asked, expected, strict=True):
        assert distance(finished[one.request_id].output, own) <= 1e-4
