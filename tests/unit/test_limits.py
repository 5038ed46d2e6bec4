"""How many images, frames, tokens and seconds of sound one request may ask for."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import fake_engine

from steploom import EngineConfig, InvalidRequest
from steploom.engine.checks.limits import LENGTHS, SOUND, TEXTS
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.requests import DiffusionRequest

TAKEN = ("prompt", "prompt_embeds", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt",
         "num_frames", "video_length", "batch_size", "class_labels", "ensemble_size", *LENGTHS, *SOUND, *TEXTS,
         "image_embeds", "image_embeddings",
         "audio_start_in_s", "max_post_steps", "jump_n_sample", "jump_length", "ar_step", "silence_padding_duration",
         "num_prompts_per_image", "num_designs_per_prompt", "latents", "latent_window_size",
         "num_latent_frames_per_chunk", "segment_frame_length", "num_frames_per_chunk")  # fmt: skip
INFO = PipelineInfo(pipeline_class="P", parameters=[Parameter(name) for name in TAKEN], frame_multiple=4)
LIMITS = EngineConfig(max_images=6, max_frames=100, max_sound_s=30, max_tokens=64, max_steps=50)
EMBEDS = np.zeros((7, 1, 1))


def check(prompt: Any = None, **params: Any) -> None:
    check_arguments(DiffusionRequest(prompt, **params), INFO, LIMITS)


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"num_images_per_prompt": 10**6}, "num_images_per_prompt", "num_images_per_prompt=1000000: at most 6 images"),
        ({"num_videos_per_prompt": 7}, "num_videos_per_prompt", "=7: at most 6 images"),
        ({"num_waveforms_per_prompt": 7}, "num_waveforms_per_prompt", "EngineConfig.max_images"),
        ({"ensemble_size": 7, "batch_size": 2}, "ensemble_size", "EngineConfig.max_images"),
        ({"prompt": ["a"] * 7}, "prompt", "prompt: 7 of them: at most 6"),
        ({"prompt": ["a"] * 4, "num_images_per_prompt": 2}, "prompt", "4 of them, num_images_per_prompt=2: at most 6"),
        ({"prompt_embeds": EMBEDS}, "prompt_embeds", "prompt_embeds: 7 of them"),
        ({"prompt_embeds": [EMBEDS[0]] * 7}, "prompt_embeds", "prompt_embeds: 7 of them"),
        ({"class_labels": [1] * 7}, "class_labels", "class_labels: 7 of them"),
        ({"class_labels": np.zeros(7, int)}, "class_labels", "class_labels: 7 of them"),
        ({"image_embeds": np.zeros((7, 8))}, "image_embeds", "image_embeds: 7 of them"),
        ({"image_embeds": [np.zeros((1, 8))] * 7}, "image_embeds", "image_embeds: 7 of them"),
        ({"image_embeddings": np.zeros((7, 4, 2, 2))}, "image_embeddings", "image_embeddings: 7 of them"),
        (
            {"image_embeds": np.zeros((2, 8)), "num_images_per_prompt": 4},
            "num_images_per_prompt",
            "image_embeds: 2 of them, num_images_per_prompt=4: at most 6 images",
        ),
        ({"num_frames": 10**6}, "num_frames", "num_frames=1000000: at most 100 frames .*EngineConfig.max_frames"),
        ({"video_length": 101}, "video_length", "=101: at most 100"),
        ({"num_frames": 60, "prompt": ["a"] * 2}, "num_frames", "num_frames=60, prompt: 2 of them: at most 100"),
        *(({name: 31}, name, f"{name}=31: at most 30 seconds of sound .*EngineConfig.max_sound_s") for name in SOUND),
        ({"audio_length_in_s": 1e9}, "audio_length_in_s", "=1000000000.0: at most 30 seconds"),
        ({"audio_end_in_s": 45, "audio_start_in_s": 10}, "audio_end_in_s", "=45, audio_start_in_s=10: at most 30"),
        ({"duration": 16, "num_waveforms_per_prompt": 2}, "duration", "=16, num_waveforms_per_prompt=2: at most 30"),
        ({"audio_length_in_s": 8, "prompt": ["a"] * 4}, "audio_length_in_s", "prompt: 4 of them: at most 30"),
        ({"audio_length_in_s": 0}, "audio_length_in_s", "=0: must be greater than 0"),
        ({"audio_end_in_s": 3, "audio_start_in_s": 3.0}, "audio_end_in_s", "=3: must be greater than 3"),
        ({"gen_length": 10**7}, "gen_length", "=10000000: at most 64 tokens of one text .EngineConfig.max_tokens"),
        ({"gen_length": 1, "block_length": 10**9}, "block_length", "at most 64 tokens"),
        ({"max_post_steps": 10**9}, "max_post_steps", "=1000000000: at most 50 .EngineConfig.max_steps"),
        *(({name: 51}, name, f"{name}=51: at most 50") for name in ("jump_n_sample", "jump_length", "ar_step")),
        *(({name: 65}, name, f"{name}=65: at most 64 tokens of one text .*max_tokens") for name in TEXTS),
        ({"num_designs_per_prompt": 7}, "num_designs_per_prompt", "=7: at most 6"),
        ({"num_prompts_per_image": 7, "num_images_per_prompt": 2}, "num_prompts_per_image", "=7: at most 6"),
        ({"duration": 20, "silence_padding_duration": 11}, "duration", "=20, silence_padding_duration=11: at most 30"),
        ({"latent_window_size": 27}, "latent_window_size", "=27, which make 105 frames: at most 100"),
        ({"num_latent_frames_per_chunk": 27}, "num_latent_frames_per_chunk", "105 frames"),
        ({"segment_frame_length": 101}, "segment_frame_length", "=101, which make 101 frames: .*max_frames"),
        ({"num_frames_per_chunk": 101}, "num_frames_per_chunk", "101 frames"),
        ({"latents": np.zeros((1, 2, 27, 1, 1))}, "latents", r"latents of \[1, 2, 27, 1, 1\], which make 105 frames"),
        ({"latents": np.zeros((2, 2, 14, 1, 1))}, "latents", "which make 106 frames"),
    ],
)
def test_more_of_anything_than_allowed_is_refused(params: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check(**params)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "params",
    [
        {"num_images_per_prompt": 6, "num_frames": None},
        {"prompt": ["a"] * 3, "num_images_per_prompt": 2, "batch_size": 6},
        {"prompt_embeds": EMBEDS[:6], "num_images_per_prompt": None},
        {"prompt_embeds": EMBEDS[:, 0]},  # not rows of texts
        {"num_frames": 50, "num_videos_per_prompt": 2},
        {"ensemble_size": 6, "batch_size": 6},
        {"audio_end_in_s": 110, "audio_start_in_s": 80.0, "audio_duration": 30},
        {"audio_length_in_s": 5, "prompt": ["a"] * 6},
        {"audio_duration": -1, "audio_end_in_s": None},  # the length of the sound that is given
        {"gen_length": 64, "block_length": 64, "prompt": ["a"] * 6, "max_post_steps": 50},
        {"num_prompts_per_image": 4, "num_images_per_prompt": 4},
        {"max_sequence_length": 64, "max_new_tokens": None, "jump_n_sample": 50, "ar_step": 0},
        {"latent_window_size": 25, "latents": np.zeros((1, 2, 25, 1, 1)), "segment_frame_length": 100},
        {"latents": np.zeros((1, 999, 64))},  # packed
        {"duration": 20, "silence_padding_duration": 10},
    ],
)
def test_as_many_as_allowed_pass(params: dict[str, Any]) -> None:
    check(**params)


@pytest.mark.parametrize("images", [[np.zeros((8, 8, 3))] * 3, np.zeros((3, 8, 8, 3))])
def test_images_count_where_there_is_no_prompt(images: Any) -> None:
    names = ("image", "num_images_per_prompt", "num_frames")
    info = PipelineInfo(pipeline_class="P", parameters=[Parameter(name) for name in names])
    request = DiffusionRequest(None, image=images, num_images_per_prompt=3)
    with pytest.raises(InvalidRequest, match="image: 3 of them, num_images_per_prompt=3: at most 6"):
        check_arguments(request, info, LIMITS)
    with pytest.raises(InvalidRequest, match="num_frames=40, image: 3 of them: at most 100 frames"):
        check_arguments(DiffusionRequest(None, image=images, num_frames=40), info, LIMITS)
    beside = msgspec.structs.replace(info, parameters=[*info.parameters, Parameter("prompt")])
    check_arguments(DiffusionRequest("a", image=images, num_images_per_prompt=3), beside, LIMITS)


def test_the_pipelines_own_length_counts_where_none_is_given() -> None:
    info = PipelineInfo(pipeline_class="P", parameters=[Parameter("gen_length")], default_length=65)
    with pytest.raises(InvalidRequest, match="gen_length=65: at most 64 tokens"):
        check_arguments(DiffusionRequest(), info, LIMITS)
    check_arguments(DiffusionRequest(gen_length=64), info, LIMITS)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "audio_duration=60.0: at most 30 seconds"),
        ({"audio_duration": None}, "audio_duration=60.0: at most 30"),
        ({"audio_duration": 0, "src_audio": np.zeros((2, 310))}, "audio_duration=31.0: at most 30"),
        ({"audio_duration": -1.0, "src_audio": np.zeros((2, 310))}, "audio_duration=31.0: at most 30"),
        ({"audio_duration": 30}, None),
        ({"audio_duration": None, "src_audio": np.zeros((2, 300))}, None),
    ],
)
def test_the_pipelines_own_seconds_count_where_none_are_given(params: dict[str, Any], words: str | None) -> None:
    names = ("prompt", "audio_duration", "src_audio")
    parameters = [Parameter(name) for name in names]
    info = PipelineInfo(pipeline_class="P", parameters=parameters, default_sound_s=60.0, sampling_rate=10)
    if words is None:
        check_arguments(DiffusionRequest("a", **params), info, LIMITS)
        return
    with pytest.raises(InvalidRequest, match=words):
        check_arguments(DiffusionRequest("a", **params), info, LIMITS)


def test_where_the_frames_of_latents_are_counts() -> None:
    info = msgspec.structs.replace(INFO, latent_axes=(1, 3, 4))
    check_arguments(DiffusionRequest(latents=np.zeros((1, 2, 27, 1, 1))), info, LIMITS)
    with pytest.raises(InvalidRequest, match="which make 105 frames"):
        check_arguments(DiffusionRequest(latents=np.zeros((1, 27, 2, 1, 1))), info, LIMITS)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"frame_rate": 0.1}, "frame_rate"),
        ({"frame_rate": 4, "num_frames": 25, "num_videos_per_prompt": 6}, "frame_rate"),
        ({"num_frames": 97, "num_videos_per_prompt": 8}, "num_frames"),
        ({"frame_rate": 10}, None),
        ({"frame_rate": 0.1, "enable_sound": False}, None),
    ],
)
def test_the_sound_of_a_video_is_as_long_as_the_video(params: dict[str, Any], field: str | None) -> None:
    names = ("num_frames", "frame_rate", "num_videos_per_prompt", "enable_sound")
    info = PipelineInfo(
        pipeline_class="P",
        parameters=list(map(Parameter, names)),
        makes=["videos", "audios"],
        frame_rate=24.0,
        default_frames=25,
    )
    limits = EngineConfig(max_sound_s=30)
    asked = DiffusionRequest(**{"enable_sound": True, **params})
    if field is None:
        check_arguments(asked, info, limits)
        return
    with pytest.raises(InvalidRequest, match=r"seconds of sound, at most 30 of one request .*max_sound_s") as caught:
        check_arguments(asked, info, limits)
    assert caught.value.field == field
    check_arguments(asked, msgspec.structs.replace(info, makes=["videos"]), limits)


@pytest.mark.parametrize("setting", ["num_train_timesteps", "solver_order"])
def test_a_noise_scheduler_has_no_more_levels_than_any_model(setting: str) -> None:
    DiffusionRequest(noise_scheduler={setting: 100_000})
    with pytest.raises(InvalidRequest, match=rf"noise_scheduler\['{setting}'\]=100001: must be at most 100000"):
        DiffusionRequest(noise_scheduler={setting: 100_001})


@pytest.mark.parametrize(
    "name", ["num_waveforms_per_prompt", "batch_size", "ensemble_size", "video_length", *LENGTHS, *TEXTS]
)
def test_what_counts_is_an_integer(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}='many': must be an integer"):
        check(**{name: "many"})


async def test_the_engine_refuses_a_million_prompts_before_any_work() -> None:
    async with fake_engine() as (engine, executor):
        with pytest.raises(InvalidRequest, match=r"1000000 of them: at most 64 images .*max_images"):
            await engine.generate(["a cat"] * 10**6)
        assert not executor.log
