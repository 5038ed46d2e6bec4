"""Layouts: rows of different counts by branch, as what cuts the batch by branches wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom.requests import DiffusionRequest
from steploom.weave.axes import Axes
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.forwards.graphs import padded
from steploom.worker.trials.probes import samples


class Echo:
    """Stands for a shared module: notes what it was called with."""

    def __init__(self, function: Any = lambda x, **_: x) -> None:
        self.function, self.calls = function, []
        self.name, self.key, self.method, self.module = "transformer", "echo", "forward", self
        self.group, self.ragged, self.language, self.adapted = "echo", None, None, None

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


def call(target: Any, *args: Any, **kwargs: Any) -> ModuleCall:
    return ModuleCall(target, args, kwargs)


def labelled(name: int, rows: int, width: int = 2) -> torch.Tensor:
    """Row r of request ``name`` holds 10 * name + r."""
    return (10.0 * name + torch.arange(rows)).unsqueeze(1).expand(rows, width).contiguous()


def test_rows_of_other_counts_merge_by_branch():
    target = Echo()
    calls = [call(target, labelled(1, 3)), call(target, labelled(2, 6))]
    for branches in (3, 0):
        merged = MergedCall(calls, Axes((0,), (0,)), branches=branches)
        results = dict(zip(merged.order, merged.run(), strict=True))
        assert target.calls[-1][0][0][:, 0].tolist() == [20, 21, 10, 22, 23, 11, 24, 25, 12]
        assert all(torch.equal(results[i], own.leaves[0]) for i, own in enumerate(calls))
        assert merged.layout.of_rows(["B", "A"]) == ["B", "B", "A"] * 3


def test_a_layout_is_part_of_the_kind_and_sizes_are_not():
    target = Echo()

    def kind(*rows: int, branches: int | None = None) -> Any:
        calls = [call(target, labelled(i, own)) for i, own in enumerate(rows)]
        return MergedCall(calls, Axes((0,), (0,)), branches=branches).kind

    assert kind(3, 6, branches=3) == kind(3, 9, 6, branches=3) != kind(3, 6)
    assert kind(2, 4, branches=2) != kind(2, 4, branches=1)
    assert kind(2, 4, branches=0) == kind(12, 6, branches=0), "one check, where nobody knows how many there are"
    assert kind(3, 2, branches=0) == kind(3, 2), "what has nothing in common has no other layout"
    assert kind(2, 2, branches=2) == kind(2, 2) == kind(2, 2, branches=0)


def test_calls_by_their_branches():
    target = Echo()
    merged = MergedCall([call(target, labelled(i, rows)) for i, rows in enumerate((2, 6, 4, 3, 3))], Axes((0,), (0,)))
    assert merged.by_branches([1, 3, 4, 2, 1]) == {2: [0, 1], 1: [2], 0: [3], 3: [4]}


@given(
    images=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    branches=st.integers(1, 4),
    told=st.booleans(),
    axis=st.integers(0, 1),
    each=st.integers(1, 3),
)
def test_by_branch_every_branch_stands_together(images, branches, told, axis, each):
    """Whatever the batch is cut into, each piece has each call's rows of that branch; lists go as tensors do."""
    target = Echo(lambda x, rows: (x, rows))
    calls = []
    for i, count in enumerate(images):
        label = torch.arange(branches * count * each) + 100 * i
        x = (label if axis == 0 else label.unsqueeze(0)).reshape([-1, 1] if axis == 0 else [1, -1])
        calls.append(call(target, x, [torch.full((1,), 100.0 * i + r) for r in range(branches * count)]))
    merged = MergedCall(calls, Axes((axis, "rows"), (axis, "rows")), branches=branches if told else 0)
    results = merged.run()
    (x, rows), _ = target.calls[0]
    for j, piece in enumerate(x.chunk(branches, axis)):
        wanted = [100 * i + j * n * each + r for i, n in enumerate(images) for r in range(n * each)]
        assert sorted(piece.flatten().tolist()) == sorted(wanted)
    assert [int(entry) % 100 * each for entry in rows] == x.flatten()[::each].remainder(100).tolist()
    for i, (own, entries) in zip(merged.order, results, strict=True):
        assert torch.equal(own, calls[i].leaves[0])
        assert [e.item() for e in entries] == [e.item() for e in calls[i].leaves[1]]


def test_graphs_pad_what_stands_by_branch_by_whole_calls():
    target = Echo()
    calls = [call(target, labelled(i, 3 * images)) for i, images in enumerate((1, 2, 1, 1))]
    whole = padded(MergedCall(calls, Axes((0,), (0,)), branches=3))
    whole.run()
    thirds = target.calls[0][0][0][:, 0].chunk(3)
    assert whole.rows == [6, 3, 3, 3, 3]
    assert [third.tolist() for third in thirds] == [
        [10 + 2 * j, 11 + 2 * j, j, 20 + j, 30 + j, 30 + j] for j in range(3)
    ]


@pytest.mark.parametrize(
    ("prompt", "params", "expected"),
    [
        ("a", {}, 1),
        ("a", {"num_images_per_prompt": 3}, 3),
        (["a", "b"], {"num_videos_per_prompt": 2}, 4),
        (["a", "b"], {"num_images_per_prompt": None, "negative_prompt": ["x", "y"]}, 2),
        (None, {"prompt_embeds": torch.ones(3, 4, 8), "pooled_prompt_embeds": torch.ones(3, 8)}, 3),
        (None, {"prompt_embeds": torch.ones(2, 4, 8), "num_images_per_prompt": 2}, 4),
        ([], {"num_images_per_prompt": 0}, 1),
    ],
)
def test_samples_that_a_request_asks_for(prompt: Any, params: dict[str, Any], expected: int):
    assert samples(DiffusionRequest(prompt, **params)) == expected
