"""What tells a program's private tree of a module from the shared one, and from those of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import nn

from steploom.weave.modules.shared import clone_tree, own_processors
from steploom.weave.modules.switches import Switches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ip = Attention(8, heads=2, dim_head=4)
        self.ip.set_processor(SD3IPAdapterJointAttnProcessor2_0(8, 8, 4, timesteps_emb_dim=8))
        self.plain = Attention(8, heads=2, dim_head=4, processor=AttnProcessor2_0())
        self.plain.processor.strengths = [1.0, [0.5]]
        self.norm = nn.LayerNorm(8)
        self.settings = {"a": [1, 2], "b": (True, None)}
        self.mixed = [nn.ReLU(), 1]
        self.cached = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cached, self.calls = x, getattr(self, "calls", 0) + 1
        return x


def tree(net: nn.Module) -> tuple[Any, Switches]:
    clone = own_processors(clone_tree(net))
    return clone, Switches(clone)


def put(where: Any, what: Any, value: Any) -> None:
    where[what] = value


PLAIN: dict[str, Callable[[Any], Any]] = {
    "number": lambda net: setattr(net.norm, "eps", 0.5),
    "scale of an SD3 IP-Adapter": lambda net: setattr(net.ip.processor, "scale", 0.0),
    "new attribute": lambda net: setattr(net.norm, "new", "x"),
    "attribute gone": lambda net: delattr(net.norm, "eps"),
    "dict in place": lambda net: put(net.settings, "a", 5),
    "list in a dict": lambda net: put(net.settings["a"], 0, 5),
    "another tuple": lambda net: put(net.settings, "b", (False, None)),
    "True for 1": lambda net: put(net.settings["a"], 0, True),
    "list of a processor": lambda net: put(net.plain.processor.strengths, 0, 0.0),
    "list in a list": lambda net: put(net.plain.processor.strengths[1], 0, 0.0),
    "setting of a processor": lambda net: setattr(net.plain.processor, "flag", True),
    "processor": lambda net: net.plain.set_processor(PAGIdentitySelfAttnProcessor2_0()),
    "training": lambda net: net.norm.train(not net.norm.training),
    "dtype": lambda net: setattr(net, "wanted", torch.float16),
}
OWN: dict[str, Callable[[Any], Any]] = {
    "hook": lambda net: net.norm.register_forward_hook(print),
    "hook before": lambda net: net.norm.register_forward_pre_hook(print),
    "child": lambda net: setattr(net, "norm", nn.Identity()),
    "parameter": lambda net: setattr(net.norm, "weight", nn.Parameter(torch.zeros(8))),
    "buffer": lambda net: net.norm.register_buffer("extra", torch.zeros(8)),
    "tensor": lambda net: setattr(net.norm, "mask", torch.zeros(8)),
    "function": lambda net: setattr(net.norm, "forward", print),
    "object in a list": lambda net: put(net.mixed, 1, nn.ReLU()),
    "processor of somebody's own": lambda net: net.plain.set_processor(lambda *args, **kwargs: None),
}


@pytest.mark.parametrize("name", [*PLAIN, *OWN])
def test_what_was_changed_is_told_and_changes_nothing_else(name: str):
    shared = Net()
    before = {path: repr(vars(part)) for path, part in shared.named_modules()}
    strengths = repr(shared.plain.processor.__dict__)
    (first, a), (second, b), (_, untouched) = tree(shared), tree(shared), tree(shared)
    assert a.changed() == b.changed() == ()
    for net in (first, second):
        PLAIN.get(name, OWN.get(name, print))(net)
    assert a.changed()
    assert (a.changed() == b.changed()) == (name in PLAIN)
    assert a.changed() == a.changed()
    assert untouched.changed() == ()
    assert {path: repr(vars(part)) for path, part in shared.named_modules()} == before
    assert repr(shared.plain.processor.__dict__) == strengths


def test_what_is_set_back_is_no_change():
    net, switches = tree(Net())
    strengths, processor = net.plain.processor.strengths, net.plain.processor
    hook = net.norm.register_forward_hook(print)
    net.norm.eps, strengths[0], net.settings["a"][0] = 0.5, 0.0, 7
    net.plain.set_processor(PAGIdentitySelfAttnProcessor2_0())
    assert len(switches.changed()) == 4
    hook.remove()
    net.norm.eps, strengths[0], net.settings["a"][0] = 1e-5, 1.0, 1
    net.plain.set_processor(processor)
    assert switches.changed() == ()
    net.settings = {"a": [1, 2], "b": (True, None)}
    assert switches.changed() == (), "the same by value"


def test_processors_that_differ_in_a_setting_are_told_apart():
    (one, a), (other, b) = tree(Net()), tree(Net())
    for net, value in ((one, 1), (other, 2)):
        processor = JointAttnProcessor2_0()
        processor.strength = [value]
        net.plain.set_processor(processor)
    assert a.changed() != b.changed()
    other.plain.processor.strength[0] = 1
    assert a.changed() == b.changed()


def test_what_a_forward_leaves_behind_is_no_change():
    net, switches = tree(Net())
    net.norm.eps = 0.5
    changed = switches.changed()
    net(torch.zeros(1))
    switches.ran()
    assert switches.changed() == changed
    net.calls = 5
    assert switches.changed() != changed


def test_each_change_of_its_own_kind_is_another():
    net, switches = tree(Net())
    seen = set()
    for _ in range(3):
        net.norm.mask = torch.zeros(1)
        seen.add(switches.changed())
    assert len(seen) == 3


def test_a_list_that_holds_itself():
    net = Net()
    net.mixed.append(net.mixed)
    net.settings["self"] = [net.settings["a"]]
    clone, switches = tree(net)
    clone.settings["self"][0].append(3)
    assert switches.changed()
