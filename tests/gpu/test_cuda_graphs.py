"""CUDA graphs on CUDA: replays equal what is not replayed, and memory comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import Driver, distance, request

from steploom import EngineConfig
from steploom.weave.forwards.cuda_graphs import CudaRecorder
from steploom.worker.runner import Runner

pytestmark = pytest.mark.usefixtures("cuda")

PIXELS = 64 * 64


def requests(count: int, turn: int) -> list[Any]:
    return [
        request(f"{turn}-{i}", "a red cat" + ", again" * (i % 2), i, num_inference_steps=3 + i % 3, height=32, width=32)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "wan"])
def test_replays_equal_forwards_that_are_not_replayed(name: str) -> None:
    settings: dict[str, Any] = {"model": f"shallow:{name}", "device": "cuda", "dtype": "float32", "max_pixels": PIXELS}
    plain = Driver(Runner.load(EngineConfig(**settings)))
    runner = Runner.load(EngineConfig(**settings, cuda_graphs=True, max_batch=8))
    driver = Driver(runner)
    assert runner.stats().graphs["captures"] > 0
    for turn, count in enumerate((1, 3, 8)):
        own = requests(count, turn)
        expected, found = plain.drain(own), driver.drain(own)
        for one in own:
            assert found[one.request_id].error is None, found[one.request_id].error
            assert distance(found[one.request_id].output[0].cpu(), expected[one.request_id].output[0].cpu()) <= 1e-4
    stats = runner.stats().graphs
    assert stats["replays"] > 0
    assert stats["bytes"] <= runner._config.cuda_graph_bytes
    runner.forget_weights()
    assert runner.stats().graphs["held"] == 0


def test_what_waits_for_the_device_is_not_recorded_and_does_no_harm() -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x * x.sum().item())
    recording, result = recorder.record(lambda: x * 2)
    x.fill_(3.0)
    recording.replay()
    assert result.tolist() == [6.0] * 8
    recording.release()
    recording, result = recorder.record(lambda: x + 1)  # a pool without graphs is not asked for again
    recording.replay()
    assert result.tolist() == [4.0] * 8
