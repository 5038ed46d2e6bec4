"""Objects and containers of an application that hold the pipeline or its parts: each request has copies of its own."""

from __future__ import annotations

import collections
import dataclasses
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from driving import Driver, alone, config, distance, request
from patching import factor, with_prompts

from steploom import ConfigError
from steploom.worker.runner import Runner


class Decorator:
    """What counts calls, say."""

    def __init__(self, function: Callable[..., Any], scale: float = 1) -> None:
        self.function, self.scale, self.calls = function, scale, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(args[0] * self.scale, *args[1:], **kwargs)


def decorated_step(pipe: Any) -> None:
    pipe.scheduler.step = Decorator(pipe.scheduler.step, 0.9)


def decorated_twice(pipe: Any) -> None:
    pipe.scheduler.step = Decorator(Decorator(pipe.scheduler.step, 0.9), 0.9)


def method_of_an_object(pipe: Any) -> None:
    pipe.scheduler.step = Decorator(pipe.scheduler.step, 0.9).__call__


def decorated_latents(pipe: Any) -> None:
    pipe.prepare_latents = Decorator(pipe.prepare_latents)


def decorated_tokenizer(pipe: Any) -> None:
    inner = pipe.tokenizer._encode_plus

    class Padded(Decorator):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.function(*args, **kwargs)

    pipe.tokenizer._encode_plus = Padded(inner)


@dataclasses.dataclass(slots=True)
class Slots:
    """Has no ``__dict__``."""

    pipe: Any
    unset: Any = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """Cannot be changed."""

    pipe: Any


class Both(Slots):
    """Has slots and a ``__dict__``."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.again = pipe


class Odd:
    """Does not want to be copied, or looked at."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def raises(self, *_: Any) -> Any:
        raise RuntimeError("not so")

    __copy__ = __deepcopy__ = __reduce_ex__ = __getattr__ = __bool__ = __len__ = __iter__ = __repr__ = raises


class Listed(list[Any]):
    """A list of a class of its own."""

    def __iter__(self) -> Any:
        raise RuntimeError("not so")


class Tree:
    """Knows itself."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.itself = pipe, (self, {"itself": self})


Pair = collections.namedtuple("Pair", "scale pipe")
HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "slots": (Slots, lambda held: held.pipe),
    "frozen with slots": (Frozen, lambda held: held.pipe),
    "both": (Both, lambda held: held.again),
    "odd": (Odd, lambda held: held.pipe),
    "list": (lambda pipe: [pipe], lambda held: held[0]),
    "list of a class": (lambda pipe: Listed([pipe]), lambda held: held[0]),
    "tuple": (lambda pipe: (1, pipe), lambda held: held[1]),
    "named tuple": (lambda pipe: Pair(0.9, pipe), lambda held: held.pipe),
    "dict": (lambda pipe: {"pipe": pipe}, lambda held: held["pipe"]),
    "key": (lambda pipe: {pipe: "pipe"}, lambda held: next(iter(held))),
    "ordered dict": (lambda pipe: collections.OrderedDict(pipe=pipe), lambda held: held["pipe"]),
    "defaultdict": (lambda pipe: collections.defaultdict(lambda: pipe), lambda held: held["pipe"]),
    "mapping proxy": (lambda pipe: types.MappingProxyType({"pipe": pipe}), lambda held: held["pipe"]),
    "deque": (lambda pipe: collections.deque([pipe, pipe], maxlen=1), lambda held: held[0]),
    "set": (lambda pipe: {pipe}, lambda held: next(iter(held))),
    "frozenset": (lambda pipe: frozenset({pipe}), lambda held: next(iter(held))),
    "weak set": (lambda pipe: weakref.WeakSet([pipe]), lambda held: next(iter(held))),
    "namespace": (lambda pipe: types.SimpleNamespace(pipe=pipe), lambda held: held.pipe),
    "cycle": (Tree, lambda held: held.itself[1]["itself"].pipe),
    "nested": (lambda pipe: Frozen({"all": (collections.deque([Slots(pipe)]),)}),
               lambda held: held.pipe["all"][0][0].pipe),
}  # fmt: skip


def holder(name: str) -> Callable[[Any], None]:
    """The pipeline holds what holds it."""
    make, get = HOLDERS[name]

    def change(pipe: Any) -> None:
        pipe.held = make(pipe)
        with_prompts(pipe, lambda self: factor(get(self.held)))

    return change


def holder_in_a_function(name: str) -> Callable[[Any], None]:
    """A function that was set on a part of the pipeline reads it."""
    make, get = HOLDERS[name]

    def change(pipe: Any) -> None:
        held, inner = make(pipe), pipe.prepare_latents
        pipe.prepare_latents = lambda *args, **kwargs: inner(*args, **kwargs) * factor(get(held))

    return change


def all_components(pipe: Any) -> None:
    """Each is the request's own: what it does to them stays with it."""
    pipe.saved = dict(pipe.components)
    names = ("scheduler", "tokenizer", "transformer", "vae")
    with_prompts(pipe, lambda self: 0.9 if all(self.saved[name] is getattr(self, name) for name in names) else 0.1)


class Weighting:
    """Has a tokenizer and a text encoder, as compel has."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    def __call__(self, text: str) -> float:
        tokens = self.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return 1 + 0.1 * self.encoder(tokens.input_ids)[0].mean().tanh().item()


def weighting(pipe: Any) -> None:
    pipe.weighting = Weighting(pipe.tokenizer, pipe.text_encoder)
    with_prompts(pipe, lambda self: self.weighting("a dog") * factor(self))


def weighting_in_a_closure(pipe: Any) -> None:
    weight, inner = Weighting(pipe.tokenizer, pipe.text_encoder), pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: inner(*args, **kwargs) * weight("a dog")


def tokenizers(pipe: Any) -> None:
    pipe.tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
    with_prompts(pipe, lambda self: 0.9 if self.tokenizers[1] is self.tokenizer_2 else 0.1)


CHANGES = {
    **{change.__name__: change for change in (
        decorated_step, decorated_twice, method_of_an_object, decorated_latents, decorated_tokenizer, all_components,
        weighting, weighting_in_a_closure, tokenizers)},
    **{f"attribute: {name}": holder(name) for name in HOLDERS},
    **{f"function: {name}": holder_in_a_function(name) for name in HOLDERS},
}  # fmt: skip
FAST = ["decorated_step", "all_components", "weighting", "attribute: nested"]


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in CHANGES], ids=str
)
def test_each_request_has_its_own(name: str) -> None:
    pipe, served = tiny.sd3(), tiny.sd3()
    common = {"height": 32, "width": 32}
    asked = [
        request(f"r{i}", "a cat", i, guidance_scale=4.0 + i, num_inference_steps=2 + i, **common) for i in range(2)
    ]
    for one in (pipe, served):
        CHANGES[name](one)
    reports = (driver := Driver(Runner.from_pipeline(served, config()))).drain(asked)
    for one in asked:
        assert reports[one.request_id].error is None, reports[one.request_id].error
        assert distance(reports[one.request_id].output, alone(pipe, one)) <= 1e-4, one.request_id
    assert max(driver.sharing("r1")) >= 2


def test_the_applications_own_objects_stay_as_they_are() -> None:
    pipe = tiny.sd3()
    decorated_step(pipe)
    pipe.held = held = [pipe, {"scheduler": pipe.scheduler}]
    step = pipe.scheduler.step
    Driver(Runner.from_pipeline(pipe, config())).drain(
        [request("r", "a cat", 0, num_inference_steps=2, height=32, width=32)]
    )
    assert pipe.held is held
    assert held[0] is pipe
    assert held[1]["scheduler"] is pipe.scheduler
    assert pipe.scheduler.step is step
    assert step.function.__self__ is pipe.scheduler
    assert step.calls == 0


class Tap:
    """Keeps what a module has given last."""

    def __init__(self, pipe: Any, module: Any) -> None:
        self.pipe, self.module, self.seen = pipe, module, 0.0
        module.register_forward_hook(self.note)

    def note(self, module: Any, args: Any, output: Any) -> None:
        self.seen = output[0].mean()


def tap_in_a_function(pipe: Any) -> None:
    tap, inner = Tap(None, pipe.text_encoder), pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: inner(*args, **kwargs) * tap.seen


def tap_that_is_read(pipe: Any) -> None:
    pipe.tap = Tap(pipe, pipe.text_encoder)
    with_prompts(pipe, lambda self: 0.9)
    type(pipe).scale = property(lambda self: self.tap.seen)


@pytest.mark.parametrize("change", [tap_in_a_function, tap_that_is_read], ids=lambda change: change.__name__)
def test_a_copy_would_not_see_what_a_hook_keeps(change: Callable[[Any], None]) -> None:
    pipe = tiny.sd3()
    change(pipe)
    with pytest.raises(ConfigError, match="through a Tap that a hook or forward of a module"):
        Runner.from_pipeline(pipe, config())


def test_what_nobody_reads_may_be_of_a_hook() -> None:
    pipe = tiny.sd3()
    pipe.tap = tap = Tap(pipe, pipe.text_encoder)
    asked = [request("r", "a cat", 0, num_inference_steps=2, height=32, width=32)]
    assert Driver(Runner.from_pipeline(pipe, config())).drain(asked)["r"].error is None
    assert tap.seen != 0.0


def test_what_an_object_closes_stays_open() -> None:
    closed: list[int] = []
    pipe = tiny.sd3()
    pipe.service = type("Service", (Slots,), {"__del__": lambda self: closed.append(1)})(pipe)
    asked = [request("r", "a cat", 0, num_inference_steps=2, height=32, width=32)]
    assert Driver(Runner.from_pipeline(pipe, config())).drain(asked)["r"].error is None
    gc.collect()
    assert not closed
