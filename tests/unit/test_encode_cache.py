"""The cache of text-encoder results: what it keeps, and what makes it ask again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.calls import ModuleCall
from steploom.weave.forwards.encode_cache import EncodeCache
from steploom.weave.modules.shared import Target


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) + self.offset


def key(cache: EncodeCache, module: nn.Module, value: float = 1.0) -> Any:
    cache.look_again()
    found = cache.key(ModuleCall(Target("text_encoder", "forward", module, id(module)), (torch.full((4,), value),), {}))
    assert found is not None
    return found


def kept(cache: EncodeCache, keys: list[Any]) -> list[bool]:
    return [one in cache._entries for one in keys]


def test_the_least_recently_used_goes_first_and_the_bound_holds() -> None:
    cache, module = EncodeCache(100), Encoder()
    keys = [key(cache, module, float(i)) for i in range(4)]
    for one in keys[:3]:
        cache.put(one, torch.ones(8))  # 32 bytes each
        assert cache.bytes <= 100
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], torch.ones(8))
    assert kept(cache, keys) == [True, False, True, True]
    assert cache.bytes == 96
    cache.put(keys[1], torch.ones(26))  # more than fits at all: nothing goes for it
    assert kept(cache, keys) == [True, False, True, True]
    cache.put(keys[1], torch.ones(25))
    assert kept(cache, keys) == [False, True, False, False]
    assert cache.bytes == 100


def test_what_holds_no_bytes_is_not_kept_for_ever() -> None:
    cache, module = EncodeCache(100), Encoder()
    for i in range(3):
        cache.put(key(cache, module, float(i)), (None, torch.ones(0)))
    assert not cache._entries


def test_kept_results_are_nobodys_to_change() -> None:
    cache, result = EncodeCache(100), torch.ones(8)
    one = key(cache, Encoder())
    cache.put(one, result)
    result.zero_()
    cache.get(one).zero_()
    assert cache.get(one).sum() == 8


def _in_place(module: Encoder) -> None:
    with torch.no_grad():
        module.inner.weight[1, 2] += 1


def _data(module: Encoder) -> None:
    module.inner.weight.data.mul_(2)


def _other_data(module: Encoder) -> None:
    module.inner.weight.data = module.inner.weight.data * 2


def _buffer(module: Encoder) -> None:
    module.offset.data.add_(1)


def _dtype(module: Encoder) -> None:
    module.double()


def _hook(module: Encoder) -> None:
    module.inner.register_forward_hook(lambda part, args, result: -result)


def _pre_hook(module: Encoder) -> None:
    module.register_forward_pre_hook(lambda part, args: (-args[0],))


def _method(module: Encoder) -> None:
    module.forward = lambda ids: ids


def _number(module: Encoder) -> None:
    module.inner.scale = 0.5


def _class(module: Encoder) -> None:
    module.inner.__class__ = type("Other", (nn.Linear,), {})


def _part(module: Encoder) -> None:
    module.inner.add_module("after", nn.ReLU())


@pytest.mark.parametrize(
    "change", [_number, _class, _part, _in_place, _data, _other_data, _buffer, _dtype, _hook, _pre_hook, _method]
)
def test_whatever_changes_the_results_changes_the_key(change: Callable[[Encoder], None]) -> None:
    cache, module = EncodeCache(100), Encoder()
    before = key(cache, module)
    assert key(cache, module) == before
    change(module)
    assert key(cache, module) != before


def test_what_is_undone_is_found_again() -> None:
    cache, module = EncodeCache(100), Encoder()
    before = key(cache, module)
    handle = module.register_forward_hook(lambda part, args, result: -result)
    assert key(cache, module) != before
    handle.remove()
    assert key(cache, module) == before


def test_what_forwards_leave_behind_is_found_again() -> None:
    cache, module = EncodeCache(100), Encoder()
    module.inner.mask = None
    before = key(cache, module)
    module.inner.mask = torch.ones(3)
    module.inner._sizes = {(1, 2): 3}
    assert key(cache, module) == before


def test_modules_that_were_seen_are_let_go() -> None:
    cache, module = EncodeCache(100), Encoder()
    cache.put(key(cache, module), torch.ones(8))
    gone = weakref.ref(module.inner)
    cache.forget_modules()
    del module
    gc.collect()
    assert gone() is None
    assert cache.bytes == 32
