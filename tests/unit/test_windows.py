"""In how many windows a long video is made, by the arguments of its pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steploom import EngineConfig, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.protocol.windows import windows
from steploom.requests import DiffusionRequest
from steploom.worker.bounds import RequestBounds

STEPS = "num_inference_steps"
FRAMEPACK = ["num_frames", "latent_window_size", STEPS]
HELIOS = ["num_frames", "num_latent_frames_per_chunk", STEPS]
SKYREELS = ["num_frames", "base_num_frames", "overlap_history", STEPS]
ANIMATE = ["pose_video", "segment_frame_length", "prev_segment_conditioning_frames", STEPS]
LONG_LTX = ["num_frames", "temporal_tile_size", "temporal_overlap", STEPS]


def info(names: list[str], **more: Any) -> PipelineInfo:
    parameters = [Parameter(name) for name in names]
    return PipelineInfo(pipeline_class="P", parameters=parameters, default_steps=5, frame_multiple=4, **more)


@pytest.mark.parametrize(
    ("names", "params", "count"),
    [
        (FRAMEPACK, {"num_frames": 129}, 4),  # of 33 frames each
        (FRAMEPACK, {"num_frames": 20, "latent_window_size": 3}, 3),
        (FRAMEPACK, {"num_frames": 9, "latent_window_size": 3}, None),
        (HELIOS, {"num_frames": 200, "num_latent_frames_per_chunk": 3}, 23),
        (HELIOS, {"num_frames": 34}, 2),
        (SKYREELS, {"num_frames": 29, "base_num_frames": 17, "overlap_history": 5}, 2),
        (SKYREELS, {"num_frames": 290}, None),  # without an overlap it is made as a whole
        (SKYREELS, {"num_frames": 29, "base_num_frames": 5, "overlap_history": 5}, None),  # an error of its own
        (ANIMATE, {"pose_video": [0] * 77}, None),
        (ANIMATE, {"pose_video": [0] * 78}, 2),
        (ANIMATE, {"pose_video": [0] * 17, "segment_frame_length": 7}, 4),  # which the pipeline rounds to 5
        (LONG_LTX, {"num_frames": 161}, 3),
        (LONG_LTX, {"num_frames": 81, "temporal_tile_size": 40, "temporal_overlap": 8}, 3),
        (["num_frames", STEPS], {"num_frames": 1000}, None),
        (FRAMEPACK, {"num_frames": 20, "latent_window_size": 0}, None),
        (FRAMEPACK, {"num_frames": "20", "latent_window_size": "3"}, None),
    ],
)
def test_the_windows_of_a_video(names: list[str], params: dict[str, Any], count: int | None) -> None:
    made = windows(params, info(names))
    assert (made and made.times) == count


def test_the_pipelines_own_length_and_steps_count_where_none_are_given() -> None:
    made = windows({}, info(FRAMEPACK, default_frames=129))
    assert made is not None
    assert (made.times, made.steps) == (4, 5)
    assert made.size == "latent_window_size"


def test_helios_pyramid_has_steps_for_each_stage() -> None:
    made = windows({"pyramid_num_inference_steps_list": [3, 4, 5], "num_frames": 34}, info(HELIOS))
    assert made is not None
    assert made.steps == 12


def test_the_steps_of_all_windows_are_refused_before_any_work() -> None:
    request = DiffusionRequest(num_frames=129, num_inference_steps=20)
    with pytest.raises(InvalidRequest, match=r"=20: 80 steps in 4 windows .* at most 79 .* larger latent_window_size"):
        check_arguments(request, info(FRAMEPACK), EngineConfig(max_steps=79))
    check_arguments(request, info(FRAMEPACK), EngineConfig(max_steps=80))


def test_loops_one_after_another_are_bounded_together() -> None:
    bounds = RequestBounds(DiffusionRequest(num_inference_steps=4), info([STEPS]), EngineConfig(max_steps=10))
    bounds.counted(4, 0, [])
    bounds.counted(4, 4, [])
    with pytest.raises(InvalidRequest, match="num_inference_steps=4: P takes 12 steps of it, at most 10"):
        bounds.counted(4, 8, [])


def test_stages_that_have_an_argument_each_are_bounded_each() -> None:
    stages = info(["prior_num_inference_steps", "decoder_num_inference_steps"])
    bounds = RequestBounds(DiffusionRequest(), stages, EngineConfig(max_steps=10))
    bounds.counted(10, 0, [])
    bounds.counted(10, 10, [])
    with pytest.raises(InvalidRequest, match="takes 11 steps"):
        bounds.counted(11, 10, [])


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"input_ids": np.zeros((5, 3), int)}, "input_ids"),
        ({"messages": [[{"role": "user", "content": "hi"}]] * 5}, "messages"),
    ],
)
def test_texts_count_however_they_are_given(params: dict[str, Any], field: str) -> None:
    language = info(["prompt", "input_ids", "messages"])
    with pytest.raises(InvalidRequest, match=f"{field}: 5 of them: at most 4 images") as caught:
        check_arguments(DiffusionRequest(**params), language, EngineConfig(max_images=4))
    assert caught.value.field == field


def test_one_text_of_many_tokens_or_turns_is_one() -> None:
    language = info(["prompt", "input_ids", "messages"])
    for params in ({"input_ids": np.zeros(40, int)}, {"messages": [{"role": "user", "content": "hi"}] * 5}):
        check_arguments(DiffusionRequest(**params), language, EngineConfig(max_images=4))


def test_how_much_of_an_ensemble_goes_at_once_makes_no_images() -> None:
    ensemble = info(["image", "ensemble_size", "batch_size"])
    one = {"image": np.zeros((8, 8, 3), "uint8")}
    check_arguments(DiffusionRequest(**one, batch_size=8), ensemble, EngineConfig(max_images=4))
    with pytest.raises(InvalidRequest, match="ensemble_size=5: at most 4 images"):
        check_arguments(DiffusionRequest(**one, batch_size=1, ensemble_size=5), ensemble, EngineConfig(max_images=4))


def test_elsewhere_a_batch_is_as_many_images() -> None:
    with pytest.raises(InvalidRequest, match="batch_size=1000000: at most 4 images"):
        check_arguments(DiffusionRequest(batch_size=10**6), info(["batch_size"]), EngineConfig(max_images=4))
