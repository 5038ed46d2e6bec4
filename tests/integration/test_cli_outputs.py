"""``steploom generate`` on real tiny models of video and sound: the right file by its ending."""

from __future__ import annotations

import pathlib
import wave
from typing import Any

import av
import conformance.families  # noqa: F401 - registers the cases
import pytest
import tiny
import transformers.utils.logging
from conformance.case import CASES
from PIL import Image

from steploom.cli import main
from steploom.config import EngineConfig
from steploom.worker.models import loading

SMALL = ["--backend", "inproc", "--steps", "2", "--seed", "1", "--device", "cpu"]
VIDEO = [*SMALL, "--height", "16", "--width", "16", "--set", "num_frames=5", "--set", "max_sequence_length=16"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny.wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stable_audio(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("stable-audio")
    CASES["StableAudioPipeline"].build().save_pretrained(folder)
    return folder


def generate(folder: pathlib.Path, *argv: str) -> int:
    return main.main(["generate", "two boats", "--model", str(folder), *argv])


def test_a_video_becomes_a_video_file(wan: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    target = tmp_path / "a.mp4"
    assert generate(wan, "-o", str(target), "--fps", "12", "-n", "2", *VIDEO) == 0
    for file in (tmp_path / "a-1.mp4", tmp_path / "a-2.mp4"):
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 12
        assert (len(frames), frames[0].shape) == (5, (16, 16, 3))
    assert "a-1.mp4  16x16, 5 frames, seed 1" in capsys.readouterr().out


def test_an_ending_that_does_not_fit_is_refused_before_the_work(
    wan: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    assert generate(wan, "-o", str(tmp_path / "a.wav"), *VIDEO) == 1
    assert generate(wan, "-o", str(tmp_path / "a.png"), *VIDEO) == 1
    assert capsys.readouterr().err.count("this pipeline makes videos; use .mp4") == 2
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_ending_follows_from_the_model(
    wan: pathlib.Path, stable_audio: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(wan, "--save-steps", *VIDEO) == 0
    assert generate(stable_audio, *SMALL) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-steps.png", "out.mp4", "out.wav"]
    with Image.open("out-steps.png") as sheet:
        assert sheet.width > sheet.height


def test_sound_becomes_a_sound_file(stable_audio: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    pipe = CASES["StableAudioPipeline"].build()
    expected = pipe("two boats", num_inference_steps=2, output_type="pt").audios.shape[-1]
    assert generate(stable_audio, "-o", str(tmp_path / "a.wav"), *SMALL) == 0
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (pipe.vae.config.sampling_rate, expected)
    assert f"at {pipe.vae.config.sampling_rate} Hz" in capsys.readouterr().out


def test_what_loads_in_the_process_of_the_command_shows_no_bars_and_those_of_others_stay(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    assert main.main(["generate", "a cat", "-o", str(tmp_path / "out.png"), *SMALL]) == 0
    assert "%|" not in capfd.readouterr().err
    loading.load(EngineConfig(device="cpu"), lambda _: None)
    assert "%|" in capfd.readouterr().err
