"""CUDA graphs without CUDA: buckets, padding, static buffers, bounds; the fake recorder replays on the buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.axes import Axes
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.forwards.graphs import Graphs, Replayed, bucket, padded
from steploom.weave.modules.shared import SharedModule

AXES = Axes((0, 0), (0,))


class FakeRecording:
    """Runs again on what the buffers hold, and overwrites the results that were recorded."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self.nbytes, self.released = 0, False
        self._run, self._result = run, result

    def replay(self) -> None:
        assert not self.released
        self._result[0].copy_(self._run()[0])

    def release(self) -> None:
        self.released = True


class FakeRecorder:
    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.made: list[FakeRecording] = []
        self.fault: Exception | None = None

    def record(self, run: Callable[[], Any]) -> tuple[FakeRecording, Any]:
        if self.fault is not None:
            raise self.fault
        result = run()
        self.made.append(FakeRecording(run, result))
        return self.made[-1], result


class Model(nn.Module):
    """Rows depend on their own values alone; notes how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor, time: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
        self.rows.append(x.shape[0])
        return (torch.sin(x * self.weight) * scale + time[:, None],)


class World:
    """A model behind graphs; counts what it computes itself."""

    def __init__(self, limit: int = 8, limit_bytes: int = 2**20) -> None:
        self.model, self.recorder = Model(), FakeRecorder()
        self.shared = SharedModule("transformer", self.model)
        self.graphs = Graphs(self.recorder, limit, limit_bytes)
        target = self.shared.targets["forward"]
        target.wrap(self.graphs.around)
        self.forwards = Replayed(self.graphs, frozenset({target}))

    def call(self, seed: int, rows: int = 2, width: int = 4, **more: Any) -> ModuleCall:
        noise = torch.Generator().manual_seed(seed)
        own = torch.randn(rows, width, generator=noise), torch.rand(rows, generator=noise)
        return ModuleCall(self.shared.targets["forward"], own, more)

    def run(self, calls: list[ModuleCall], *, known: bool = True) -> None:
        """Runs calls merged, and compares with each alone."""
        expected = [self.model(*call.arguments[0], **call.arguments[1])[0] for call in calls]
        merged = MergedCall(calls, AXES)
        results = self.forwards.merged(merged, known=known)
        assert len(results) == len(calls)
        for place, result in zip(merged.order, results, strict=True):
            torch.testing.assert_close(result[0], expected[place])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 32]


def test_padding_repeats_whole_calls_of_each_row_count():
    world = World()
    calls = [world.call(i, rows) for i, rows in enumerate((2, 1, 2, 2, 1, 1))]
    whole = padded(MergedCall(calls, AXES))
    assert whole.rows == [2, 2, 2, 2, 1, 1, 1, 1]
    assert whole.total_rows == 12


@pytest.mark.parametrize("kinds", [(2,), (2, 1), (1, 2, 3)])
def test_every_number_of_calls_gets_its_own_results(kinds: tuple[int, ...]):
    world = World(limit=64)
    for turn in range(3):
        for count in range(1, 17):
            world.run([world.call(100 * turn + i, kinds[i % len(kinds)]) for i in range(count)])
    assert world.graphs.replays > world.graphs.captures > 0
    if kinds == (2,):
        assert world.graphs.captures == 5  # 1, 2, 4, 8 and 16 calls


def test_the_first_is_run_the_second_recorded_and_the_third_replayed():
    world = World()
    for recorded, replays in ((0, 0), (1, 1), (1, 2)):
        world.run([world.call(replays), world.call(7)])
        assert (len(world.recorder.made), world.graphs.replays) == (recorded, replays)


def test_results_outlive_the_next_replay():
    world = World()
    kept = [world.forwards.alone(world.call(i))[0] for i in range(4)]
    for i, result in enumerate(kept):
        torch.testing.assert_close(result, world.model(*world.call(i).arguments[0])[0])


def test_arguments_stay_as_they_are():
    world = World()
    calls = [world.call(i) for i in range(4)]
    before = [call.leaves[0].clone() for call in calls]
    for call in calls:
        world.forwards.alone(call)
    assert all(torch.equal(call.leaves[0], own) for call, own in zip(calls, before, strict=True))


def test_python_values_have_graphs_of_their_own():
    world = World()
    for turn in range(3):
        for scale in (0.5, 2.0):
            call = world.call(turn, scale=scale)
            expected = world.model(*call.arguments[0], scale=scale)[0]
            torch.testing.assert_close(world.forwards.alone(call)[0], expected)
    assert world.graphs.captures == 2


def test_kinds_that_are_being_verified_are_run_as_they_are():
    world = World()
    for _ in range(3):
        world.run([world.call(1), world.call(2), world.call(3)], known=False)
    assert world.recorder.made == []
    assert set(world.model.rows) == {2, 6}


def test_the_least_recently_used_makes_room():
    world = World(limit=2)
    for width in (4, 1, 4, 1, 4, 4):
        for seed in range(2):
            world.forwards.alone(world.call(seed, width=width))
    assert world.graphs.counts()["held"] == 2
    assert world.graphs.evictions == 0
    for seed in range(2):
        world.forwards.alone(world.call(seed, rows=3))
    assert world.graphs.counts() == {
        "held": 2, "bytes": world.graphs.nbytes, "captures": 3, "replays": world.graphs.replays, "evictions": 1,
    }  # fmt: skip
    assert [one.released for one in world.recorder.made] == [False, True, False]


def test_bytes_are_bounded():
    world = World(limit_bytes=400)
    for rows in (2, 4, 6, 40):
        for seed in range(3):
            world.forwards.alone(world.call(seed, rows))
        assert world.graphs.nbytes <= 400
    assert world.graphs.evictions > 0
    assert world.recorder.made[-1].released  # 40 rows are too large by themselves, and are not tried again
    assert len(world.recorder.made) == 4


def test_what_cannot_be_recorded_runs_as_it_is_and_is_not_padded(caplog: pytest.LogCaptureFixture):
    world = World()
    world.recorder.fault = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(4):
        world.run([world.call(1), world.call(2), world.call(3)])
    assert caplog.text.count("runs without a CUDA graph") == 1
    assert world.model.rows[-1] == 6
    assert world.graphs.replays == 0


def test_what_is_in_host_memory_is_not_frozen_into_a_graph():
    world = World()
    world.recorder.device = torch.device("meta")  # where none of the arguments are
    for _ in range(3):
        world.run([world.call(1), world.call(2)])
    assert world.recorder.made == []


def test_clearing_forgets_graphs_whose_weights_have_moved():
    world = World()
    for seed in range(3):
        world.forwards.alone(world.call(seed))
    world.graphs.clear()
    assert [one.released for one in world.recorder.made] == [True]
    assert (len(world.graphs), world.graphs.nbytes) == (0, 0)
    world.model.weight = nn.Parameter(torch.ones(4))
    for seed in range(3):
        call = world.call(seed)
        torch.testing.assert_close(world.forwards.alone(call)[0], world.model(*call.arguments[0])[0])


def test_recording_is_warm_up():
    class Counters:
        forward_s = warmup_s = 0.0

    world, counters, clock = World(), Counters(), [0.0]
    forwards = Replayed(world.graphs, frozenset(world.shared.targets.values()), lambda: clock[0])
    forwards.alone(world.call(1))
    clock[0] = 3.0
    forwards.count(5.0, counters)
    assert (counters.forward_s, counters.warmup_s) == (2.0, 3.0)
