"""Files of outputs: what pipelines give in any form comes back from the file as it was."""

from __future__ import annotations

import math
import pathlib
import types
import wave
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from steploom import media
from steploom.errors import ConfigError
from steploom.media import video
from steploom.requests import DiffusionOutput

HEIGHT, WIDTH, FRAMES = 32, 48, 7


def clip(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames whose red grows with time and whose green grows to the right, ``[frames, height, width, 3]`` in 0..1."""
    red = np.linspace(0, 1, FRAMES)[:, None, None] * np.ones((1, height, width))
    green = np.linspace(0, 1, width)[None, None] * np.ones((FRAMES, height, 1))
    return np.stack([red, green, np.full_like(red, 0.5)], axis=-1).astype(np.float32)


def made(**fields: Any) -> DiffusionOutput:
    rates = {name: fields.pop(name) for name in ("frame_rate", "sampling_rate", "output_type") if name in fields}
    return DiffusionOutput(request_id="r", output=types.SimpleNamespace(**fields), **rates)


def decoded(path: pathlib.Path) -> tuple[np.ndarray, Any]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0].average_rate


FORMS = {
    "lists of PIL": lambda c: [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in c]],
    "one list of PIL": lambda c: [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in c],
    "array": lambda c: c[None],
    "bytes": lambda c: (c[None] * 255).round().astype(np.uint8),
    "channels before height": lambda c: torch.from_numpy(c).permute(0, 3, 1, 2)[None],
    "channels before frames": lambda c: torch.from_numpy(c).permute(3, 0, 1, 2)[None],
    "half": lambda c: torch.from_numpy(c).permute(0, 3, 1, 2)[None].bfloat16(),
    "signed": lambda c: c[None] * 2 - 1,
    "one video": lambda c: c,
    "list of arrays": lambda c: [c],
    "list of frames": list,
}


@pytest.mark.parametrize("form", FORMS)
def test_frames_in_every_form_are_the_same_bytes(form: str) -> None:
    (frames,) = media.frames_of(FORMS[form](clip()))
    expected = (clip() * 255).round().astype(int)
    assert np.abs(np.stack(frames).astype(int) - expected).max() <= 1


def test_a_video_file_holds_the_frames(tmp_path: pathlib.Path) -> None:
    files = made(frames=np.stack([clip(), clip()[::-1]]), frame_rate=12.0).save(tmp_path / "a.mp4")
    assert [file.name for file in files] == ["a-1.mp4", "a-2.mp4"]
    for file, expected in zip(files, (clip(), clip()[::-1]), strict=True):
        frames, rate = decoded(file)
        assert (frames.shape, rate) == ((FRAMES, HEIGHT, WIDTH, 3), 12)
        assert np.abs(frames / 255 - expected).mean() < 0.02


def test_odd_sides_grow_by_one(tmp_path: pathlib.Path) -> None:
    made(frames=clip(31, 47)[None]).save(str(tmp_path / "a.mp4"), frame_rate=23.976)
    frames, rate = decoded(tmp_path / "a.mp4")
    assert frames.shape == (FRAMES, 32, 48, 3)
    assert float(rate) == pytest.approx(23.976, abs=1e-3)
    assert np.abs(frames[:, :31, :47] / 255 - clip(31, 47)).mean() < 0.02


def test_a_video_has_its_sound(tmp_path: pathlib.Path) -> None:
    tone = np.sin(np.linspace(0, 2000, 24000))[None, None].repeat(2, axis=1)
    made(frames=clip()[None], audio=torch.from_numpy(tone), sampling_rate=24000, frame_rate=7.0).save(
        tmp_path / "a.mp4"
    )
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.audio
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
    assert (stream.codec_context.name, stream.rate, sound.shape[0]) == ("aac", 24000, 2)
    assert sound.shape[1] == pytest.approx(24000, abs=2048)
    assert sound.std() == pytest.approx(2**-0.5, abs=0.1)


@pytest.mark.parametrize("ending", [".gif", ".webp", ".apng"])
def test_animations_need_no_package(tmp_path: pathlib.Path, ending: str, monkeypatch) -> None:
    monkeypatch.setattr(video, "library", lambda: pytest.fail("not needed"))
    made(frames=clip()[None], frame_rate=10.0).save(tmp_path / f"a{ending}")
    with Image.open(tmp_path / f"a{ending}") as animation:
        assert animation.n_frames == FRAMES
        animation.seek(1)
        assert animation.info.get("duration", 100) == 100


@pytest.mark.parametrize("shape", [(1, 1, 8000), (1, 8000), (1, 2, 8000)])
def test_a_wav_holds_the_wave(tmp_path: pathlib.Path, shape: tuple[int, ...]) -> None:
    tone = np.sin(np.linspace(0, 500, 8000)).astype(np.float32) * np.ones(shape, np.float32)
    made(audios=tone, sampling_rate=16000).save(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getsampwidth()) == (16000, 8000, 2)
        channels = file.getnchannels()
        samples = np.frombuffer(file.readframes(8000), "<i2").reshape(8000, channels).T / 32767
    assert channels == (2 if shape == (1, 2, 8000) else 1)
    assert np.abs(samples - tone.reshape(-1, 8000)).max() < 1e-4


@pytest.mark.parametrize("ending", [".flac", ".mp3", ".m4a", ".ogg"])
def test_compressed_sound_lasts_as_long(tmp_path: pathlib.Path, ending: str) -> None:
    made(audios=np.zeros((1, 1, 44100), np.float32), sampling_rate=44100).save(tmp_path / f"a{ending}")
    with av.open(str(tmp_path / f"a{ending}")) as container:
        seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert seconds == pytest.approx(1.0, abs=0.06)


def test_a_rate_that_a_format_cannot_hold_is_refused_and_leaves_no_file(tmp_path: pathlib.Path) -> None:
    sound = made(audios=np.zeros((1, 1, 400), np.float32), sampling_rate=4)
    with pytest.raises(ConfigError, match=r"cannot hold sound of 4 samples per second .*; use \.wav"):
        sound.save(tmp_path / "a.mp3")
    assert list(tmp_path.iterdir()) == []


def test_text_and_images_are_written_too(tmp_path: pathlib.Path) -> None:
    made(texts=["naïve", "two"]).save(tmp_path / "a.txt")
    assert (tmp_path / "a-1.txt").read_text(encoding="utf-8") == "naïve\n"
    made(images=torch.from_numpy(clip()[:2]).permute(0, 3, 1, 2)).save(tmp_path / "b.png")
    with Image.open(tmp_path / "b-2.png") as image:
        assert image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("output", "name", "words"),
    [
        (made(images=[]), "a.mp4", "made no videos; it made images: use .png"),
        (made(frames=clip()[None]), "a.png", "made 7 frames; use .mp4"),
        (made(frames=clip()[None]), "a.wav", "made no audios; it made videos: use .mp4"),
        (made(audios=np.zeros((1, 9))), "a.wav", "give sampling_rate="),
        (made(images=[]), "a.xyz", "'.xyz' names no format; images: .png"),
        (made(frames=np.zeros((1, 16, 2, 8, 8))), "a.mp4", "latents"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(tmp_path: pathlib.Path, output, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        output.save(tmp_path / name)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [-1, 0, math.nan, math.inf, 0.001, 5000, True, "24", Fraction(1, 51), 10**400])
@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_a_frame_rate_at_which_no_video_runs_is_refused(tmp_path: pathlib.Path, rate: Any, ending: str) -> None:
    video = made(frames=clip()[None], frame_rate=8.0)
    with pytest.raises(ConfigError, match=r"^frame_rate=.*from 0\.02 to 1000; give save\(\) another, or None"):
        video.save(tmp_path / f"a{ending}", frame_rate=rate)
    with pytest.raises(ConfigError, match=r"^frame_rate=.*another$"):
        made(frames=clip()[None], frame_rate=rate).save(tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0.02, 0.1, 23.976, 1000, np.float32(25), Fraction(30000, 1001)])
@pytest.mark.parametrize("ending", [".gif", ".webp", ".apng", ".mp4", ".webm"])
def test_the_slowest_and_the_fastest_video_can_be_saved(tmp_path: pathlib.Path, rate: Any, ending: str) -> None:
    made(frames=clip()[None]).save(tmp_path / f"a{ending}", frame_rate=rate)
    if ending == ".mp4":
        frames, found = decoded(tmp_path / "a.mp4")
        assert len(frames) == FRAMES
        assert float(found) == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize("rate", [-5, 0, 3.7, math.nan, math.inf, 2_000_000, True, "48000"])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp4"])
def test_a_sampling_rate_at_which_no_sound_runs_is_refused(tmp_path: pathlib.Path, rate: Any, name: str) -> None:
    whole = made(audios=np.zeros((1, 1, 9), np.float32), frames=clip()[None], sampling_rate=16000)
    with pytest.raises(ConfigError, match=r"^sampling_rate=.*a whole number of samples .*, or None for the model's"):
        whole.save(tmp_path / name, sampling_rate=rate)
    assert not list(tmp_path.iterdir())
    whole.save(tmp_path / name, sampling_rate=np.int64(48000))


LATENTS = {
    "images": [(1, 4, 16, 16), (1, 16, 16, 16), (3, 4, 8, 8), (1, 64, 16), (2, 8, 8, 4)],
    "frames": [(1, 4, 5, 16, 16), (1, 16, 5, 16, 16), (1, 4, 1, 16, 16)],
    "audios": [(1, 8, 64, 16), (1, 2, 64)],
}


@pytest.mark.parametrize(("field", "shape"), [(field, shape) for field, shapes in LATENTS.items() for shape in shapes])
@pytest.mark.parametrize("listed", [False, True])
def test_latents_are_never_pictures(tmp_path: pathlib.Path, field: str, shape: tuple[int, ...], listed: bool) -> None:
    """Whatever their shape looks like: the request has asked for them."""
    latents = torch.randn(shape, generator=torch.manual_seed(0))
    output = made(**{field: [latents] if listed else latents}, sampling_rate=16000, output_type="latent")
    for ending in {"images": (".png", ".gif"), "frames": (".mp4", ".gif", ".png"), "audios": (".wav", ".mp3")}[field]:
        with pytest.raises(ConfigError, match="output_type='latent': these are latents; leave output_type as it is"):
            output.save(tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


def test_pictures_are_saved_of_pipelines_that_decode_whatever_they_are_asked_for(tmp_path: pathlib.Path) -> None:
    made(images=[Image.new("RGB", (8, 8))], output_type="latent").save(tmp_path / "a.png")
    made(texts=["a"], output_type="latent").save(tmp_path / "a.txt")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (3, 16, 8, 8), (4, 12, 8, 8)])
def test_many_channels_are_latents_by_their_shape(tmp_path: pathlib.Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="these are latents"):
        made(images=torch.zeros(shape)).save(tmp_path / "a.png")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_as_many_images_as_an_image_has_channels_are_images(tmp_path: pathlib.Path, count: int, channels: int) -> None:
    images = torch.linspace(0, 1, count * channels * 6 * 5).reshape(count, channels, 6, 5)
    colours = images[:, [0, 0, 0] if channels == 1 else [0, 1, 2]].permute(0, 2, 3, 1).numpy()
    for given in (images, images.permute(0, 2, 3, 1).numpy()):
        found = np.stack([np.asarray(one) for one in media.pictures_of(given)])
        assert np.abs(found - colours * 255).max() <= 0.51
        assert len(made(images=given).save(tmp_path / "a.png")) == count


def test_without_the_extra_the_mend_is_named(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'steploom\[video\]'"):
        made(frames=clip()[None]).save(tmp_path / "a.mp4")


def test_a_view_that_is_not_there_says_what_is() -> None:
    with pytest.raises(AttributeError, match=r"without videos; it has \.images"):
        _ = made(images=[1]).videos
    picture = Image.new("RGB", (2, 2))
    assert made(video=[picture, picture]).videos == [[picture, picture]]


@pytest.mark.parametrize(("count", "said"), [(10, "a sound of 10 samples is too short for .ogg"), (0, "no samples")])
def test_a_sound_too_short_for_its_format_is_refused_and_leaves_no_file(
    tmp_path: pathlib.Path, count: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        made(audios=np.zeros((1, 1, count), np.float32), sampling_rate=44100).save(tmp_path / "a.ogg")
    assert not list(tmp_path.iterdir())
