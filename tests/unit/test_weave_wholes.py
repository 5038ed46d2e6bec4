"""Rows that stay together are not copied; all others are."""

from __future__ import annotations

import torch
from torch import nn

from steploom.weave.axes import Axes
from steploom.weave.batching.merging import MergedCall
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import ModuleCall
from steploom.weave.copies import woven_module
from steploom.weave.modules.shared import SharedModule


def test_views_in_order_are_their_whole_for_two_ticks():
    wholes, whole = Wholes(), torch.arange(6.0).view(3, 2)
    parts = list(whole.split(1))
    wholes.note(parts, whole)
    assert wholes.find(list(parts)) is whole
    assert wholes.find(parts[:2]) is None
    assert wholes.find([parts[0], parts[2], parts[1]]) is None
    assert wholes.find([part.clone() for part in parts]) is None
    wholes.begin_tick()
    assert wholes.find(parts) is whole
    wholes.begin_tick()
    assert wholes.find(parts) is None


def test_what_a_pipeline_changes_in_its_rows_is_seen_by_the_next_forward():
    shared = SharedModule("transformer", nn.Identity())
    target, wholes = shared.targets["forward"], Wholes()
    calls = [ModuleCall(target, (torch.full((1, 2), float(i)),), {}) for i in range(3)]
    results = MergedCall(calls, Axes((0,), (0,)), None, wholes).run()
    assert wholes.find(results) is not None
    results[1] += 10
    again = MergedCall([ModuleCall(target, (own,), {}) for own in results], Axes((0,), (0,)), None, wholes).run()
    assert torch.equal(torch.cat(again), torch.tensor([[0.0, 0.0], [11.0, 11.0], [2.0, 2.0]]))


def test_hooks_that_a_pipeline_sets_on_its_own_module_are_run():
    own, seen = woven_module(SharedModule("transformer", nn.Linear(2, 2))), []
    own.register_forward_hook(lambda *told: seen.append("hook"))
    own.register_forward_pre_hook(lambda *told: seen.append("pre-hook"))
    with torch.no_grad():
        own(torch.zeros(1, 2))
    assert seen == ["pre-hook", "hook"]
