"""What a worker warms up with: every shape of batch that compiles, within the limits that requests have."""

from __future__ import annotations

from typing import Any

import pytest

from steploom import EngineConfig
from steploom.protocol import Parameter, PipelineInfo
from steploom.worker.warmup import plan


def info(*names: str, **about: Any) -> PipelineInfo:
    parameters = [Parameter(name) for name in ("prompt", "num_inference_steps", *names)]
    return PipelineInfo(pipeline_class="P", parameters=parameters, size_multiple=16, **about)


def rounds(about: PipelineInfo, **settings: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(count, dict(params)) for _, count, params in plan(about, EngineConfig(**settings))]


def test_several_rows_one_row_and_no_guidance() -> None:
    found = rounds(info("width", "height", "guidance_scale", default_size=(1024, 1024), device="cuda:0"), compile=True)
    assert [count for count, _ in found] == [3, 1, 1]
    assert found[0][1] == {"num_inference_steps": 3, "width": 1024, "height": 512}
    assert found[1][1] == {"num_inference_steps": 3}
    assert found[2][1]["guidance_scale"] == 1.0


def test_a_cpu_and_a_video_are_warmed_up_with_little() -> None:
    found = rounds(info("width", "height", default_size=(1024, 1024)), compile=True)
    assert found[1][1] == {"num_inference_steps": 3, "width": 256, "height": 256}
    video = info("width", "height", "num_frames", default_size=(832, 480), makes=["videos"], frame_multiple=4,
                 device="cuda:0")  # fmt: skip
    assert rounds(video, compile=True)[1][1] == {"num_inference_steps": 3, "num_frames": 5, "width": 256, "height": 256}


def test_each_number_of_calls_that_is_captured() -> None:
    assert [count for count, _ in rounds(info(), cuda_graphs=True, max_batch=8)] == [1, 2, 4, 8]
    assert [count for count, _ in rounds(info(), cuda_graphs=True, max_batch=6)] == [1, 2, 4, 6]
    assert [count for count, _ in rounds(info(), cuda_graphs=True, max_batch=1)] == [1]


@pytest.mark.parametrize(("limits", "side"), [({"max_pixels": 64 * 64}, 64), ({"max_pixels": 100 * 100}, 96)])
def test_limits_hold(limits: dict[str, int], side: int) -> None:
    about = info("width", "height", default_size=(512, 512))
    for count, params in rounds(about, compile=True, max_batch=1, max_steps=2, **limits):
        assert count == 1
        assert params["num_inference_steps"] == 2
        assert params["width"] == side
        assert params["height"] <= side
        assert params["height"] % 16 == 0
