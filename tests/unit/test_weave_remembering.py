"""What a model's own code keeps from call to call, as it is read from its bytecode: each form, by itself."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.modules import remembering
from steploom.weave.modules.keeping import keeps
from steploom.weave.modules.remembering import remembers


class Model(nn.Module):
    """What all of them are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.kept: dict[str, Any] = {}
        self.n = 0
        self.opts = types.SimpleNamespace(scale=1.0)


def by_other_names(self: Any, x: Any) -> Any:
    a = self
    b = a
    a = b
    b.kept["x"] = x
    return self.kept["x"]


def or_another(self: Any, x: Any) -> Any:
    k = self.kept or {}
    k["x"] = x
    return k["x"]


def by_walrus(self: Any, x: Any) -> Any:
    if k := self.kept:
        k["a"] = x
    return x


def in_a_function_within(self: Any, x: Any) -> Any:
    me = self

    def fill() -> None:
        me.kept["a"] = x

    fill()
    return x + self.kept["a"]


def names_in_a_ring(self: Any, x: Any) -> Any:
    a = self.kept
    b = a
    a = b
    b["x"] = 1
    return x * len(a)


def settings(self: Any, x: Any) -> Any:
    opts = self.opts
    return x * opts.scale if opts.scale > 1 else x


def a_table(self: Any, x: Any) -> Any:
    for value in self.kept.values():
        x = x * value
    return x


def a_tally(self: Any, x: Any) -> Any:
    self.n += 1
    return x


def a_tally_that_is_told(self: Any, x: Any) -> Any:
    print(f"{self.n}")
    self.n += 1
    return x


def defaults(self: Any, x: Any, scale: float = 2.0, opts: Any = (1, 2)) -> Any:
    return x * scale * opts[0]


def a_default_that_fills(self: Any, x: Any, cache: Any = {}) -> Any:  # noqa: B006
    return cache.setdefault(1, x)


def attributes_of_an_output(self: Any, x: Any) -> Any:
    out = types.SimpleNamespace(sample=self.linear(x))
    out.sample = out.sample + 1
    return out.sample


def the_last_one_for_others(self: Any, x: Any) -> Any:
    self.last = x
    return x


def the_last_one(self: Any, x: Any) -> Any:
    y = self.last if hasattr(self, "last") else x
    self.last = x
    return y


def own_containers(self: Any, x: Any, **k: Any) -> Any:
    k.update(a=1)
    k["b"] = 2
    seen = []
    seen.append(1)
    return x * len(seen) + k["b"]


def an_argument(self: Any, x: Any, state: Any) -> Any:
    state.prev = x
    return state.prev


def the_module_by_another_name(self: Any, x: Any) -> Any:
    me = self
    me.prev = x
    return me.prev


def a_helper(self: Any, x: Any) -> Any:
    self.opts.prev = x
    return x + self.opts.prev


def a_helper_by_another_name(self: Any, x: Any) -> Any:
    opts = self.opts
    opts.prev = x
    return x + opts.prev


def a_block_of_it(self: Any, x: Any) -> Any:
    block = self.linear
    out = self.linear(x) if block.prev is None else block.prev
    block.prev = out
    return out


def measured(inner: Any, st: dict[str, Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            out = inner(*args, **kwargs)
        finally:
            st["ema"] = 0.9 * st["ema"] + 0.1 * (time.perf_counter() - began)
        if st["ema"] > 100:
            print(st["ema"], out[0].shape)
        return out

    return forward


def cached(inner: Any, st: dict[str, Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        st["n"] += 1
        if st["n"] % 2:
            return st["last"]
        out = inner(*args, **kwargs)
        st["last"] = out
        return out

    return forward


def changed(inner: Any, st: dict[str, Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        st["n"] += 1
        out.mul_(st["n"])
        return out

    return forward


def shifted(inner: Any, st: dict[str, Any]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs["scale"] = st["scale"]
        st["scale"] = 2 * st["scale"]
        return inner(*args, **kwargs)

    return forward


def compared(inner: Any, st: dict[str, Any]) -> Any:
    n = 0

    def forward(x: Any) -> Any:
        nonlocal n
        n += 1
        third = n == 3
        return inner(x) * 0.5 if third else inner(x)

    return forward


WRAPS = [(measured, None), (cached, False), (changed, False), (shifted, False), (compared, False)]


@pytest.mark.parametrize(("wrap", "kept"), WRAPS)
def test_what_only_measures_keeps_nothing_that_counts(wrap: Any, kept: bool | None) -> None:
    model = Model()
    model.forward = wrap(model.linear.forward, {"n": 0, "ema": 0.0, "scale": 1.0})
    found = remembers(model)
    assert (None if found is None else found.own) is kept


OWN = [by_other_names, names_in_a_ring, a_tally_that_is_told, the_last_one]
NOTHING = [settings, a_table, a_tally, defaults, attributes_of_an_output, the_last_one_for_others, own_containers]
ELSEWHERE = [
    a_block_of_it,
    or_another,
    by_walrus,
    in_a_function_within,
    a_default_that_fills,
    an_argument,
    the_module_by_another_name,
    a_helper,
    a_helper_by_another_name,
]


def verdict(forward: Any, **attributes: Any) -> bool | None:
    model = type("Own", (Model,), {"forward": forward})()
    model.__dict__.update(attributes)
    found = remembers(model)
    assert found is None or forward.__name__ in found.why
    return None if found is None else found.own


@pytest.mark.parametrize("forward", OWN, ids=lambda f: f.__name__)
def test_what_is_kept_on_the_module_is_had_in_a_tree_of_ones_own(forward: Any) -> None:
    assert verdict(forward) is True


@pytest.mark.parametrize("forward", NOTHING, ids=lambda f: f.__name__)
def test_what_is_only_written_or_only_read_is_no_state(forward: Any) -> None:
    assert verdict(forward) is None


@pytest.mark.parametrize("forward", ELSEWHERE, ids=lambda f: f.__name__)
def test_what_a_tree_does_not_have_or_what_is_out_of_sight_is_kept_elsewhere(forward: Any) -> None:
    assert verdict(forward) is False


class Odd:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("nobody asks for that")


class OddList(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("nobody asks for that")

    __iter__ = __bool__ = __eq__ = __len__  # type: ignore[assignment]


def test_nothing_is_asked_of_objects() -> None:
    odd, many = Odd(), OddList([1])

    def asks(self: Any, x: Any) -> Any:
        return x if odd is None else self.linear(x) * many[0]

    assert verdict(asks) is None
    assert keeps(type("Own", (), {"encode_prompt": asks})(), None) is None


def test_what_cannot_be_read_is_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("nobody reads that")

    def forward(self: Any, x: Any) -> Any:
        return x

    monkeypatch.setattr(remembering, "instructions", fails)
    model = type("Own", (Model,), {"forward": forward})()
    for found in (remembers(model), keeps(type("Own", (), {"encode_prompt": forward})(), None)):
        assert found is not None
        assert (found.own, "nobody reads that" in found.why) == (False, True)


def test_a_tensor_that_is_changed_in_place_is_not_ones_own() -> None:
    def counts(self: Any, x: Any) -> Any:
        self.count += 1
        return x * self.count

    assert verdict(counts, count=0) is True
    assert verdict(counts, count=torch.zeros(1)) is False


def test_what_the_librarys_code_reads_counts() -> None:
    from diffusers import SD3Transformer2DModel

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.out_channels = 4
        return SD3Transformer2DModel.forward(self, *args, **kwargs)

    cls = type("Own", (SD3Transformer2DModel,), {"forward": forward})
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    found = remembers(model)
    assert found is not None
    assert found.own
