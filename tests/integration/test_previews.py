"""Previews: the pipeline's own way from latents to its decoder, three ways of showing them, and no trace of either."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import numpy as np
import pytest
import tiny
import torch
from conformance.case import CASES
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from driving import Driver, config, distance
from PIL import Image

from steploom import demo
from steploom.errors import ConfigError
from steploom.requests import DiffusionRequest
from steploom.weave.aside import rest
from steploom.weave.forwards import running as forwards
from steploom.weave.noise import observed as noise
from steploom.weave.previews import preview
from steploom.worker.runner import Runner

WIDE = {"height": 32, "width": 48, "num_inference_steps": 2, "preview_every": 1}
UNSEEN = ("audio", "text", "embeddings")
"""Endings of the kinds of cases that make no pictures."""

ROUNDING = 2e-5
"""How far two runs of one request may be apart: with two threads, some sums of float32 differ from run to run."""

CASCADES = ("StableCascade", "Wuerstchen", "Kandinsky", "UnCLIP", "StableUnCLIP")
"""Beginnings of the names of pipelines whose first stage makes an embedding, and no picture."""


def streamed(pipe: Any, output_type: str = "pil", **own: Any) -> tuple[list[Any], Any, Runner]:
    """Previews, output and runner of one request; ``config`` are fields of the engine's settings."""
    runner = Runner(pipe, config(**own.pop("config", {})), in_process=True)
    driver = Driver(runner)
    driver.drain([DiffusionRequest("a red circle", request_id="x", seed=1, output_type=output_type, **own)])
    report = driver.finished["x"]
    assert report.error is None, report.error
    return [one.preview for one in driver.reports["x"] if one.stepped], report.output, runner


def grey(image: Any, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), np.float64)


def likeness(one: Any, other: Any) -> float:
    """The correlation of two pictures, at the smaller one's size."""
    size = min(one.size, other.size)
    return float(np.corrcoef(grey(one, size).ravel(), grey(other, size).ravel())[0, 1])


@pytest.mark.parametrize("build", [tiny.flux, tiny.qwen_image, tiny.sdxl, tiny.sd3])
def test_the_last_preview_is_what_the_pipeline_decodes(build) -> None:
    """Packed, with statistics by channel, scaled: all of it is the pipeline's own code. A wide picture stays wide."""
    own = {"max_sequence_length": 16} if build is tiny.flux else {}
    previews, output, _ = streamed(build(), **WIDE, **own)
    assert [picture.size for picture in previews] == [(48, 32)] * 2
    last, image = (np.asarray(picture, np.int16) for picture in (previews[-1], output.images[0]))
    if build is not tiny.sdxl:  # whose sampler's last estimate is not its last sample
        assert np.abs(last - image).max() <= 1
    assert likeness(previews[-1], output.images[0]) > 0.99
    assert np.abs(np.asarray(previews[0], np.int16) - image).max() > 1


def test_the_linear_map_shows_the_built_in_models_picture(monkeypatch) -> None:
    """Trained weights: one pixel per latent resembles the image that the VAE decodes, from the middle on."""
    monkeypatch.setattr(preview, "TINY_PARAMETERS", 0)
    pipe = DiffusionPipeline.from_pretrained(demo.path())
    own = {"num_inference_steps": 8, "preview_every": 1, "max_sequence_length": 16}
    previews, output, runner = streamed(pipe, **own)
    assert list(runner._previewer._maps) == ["vae"]
    assert previews[-1].width < output.images[0].width
    assert likeness(previews[-1], output.images[0]) > 0.9
    assert likeness(previews[-1], output.images[0]) > likeness(previews[0], output.images[0])


def test_the_map_is_fitted_at_load_and_needs_no_decoding_afterwards(monkeypatch) -> None:
    monkeypatch.setattr(preview, "TINY_PARAMETERS", 0)
    pipe = tiny.sd3()
    runner = Runner(pipe, config(), in_process=True)
    calls = []
    monkeypatch.setattr(type(pipe.vae), "decode", lambda self, *a, **k: calls.append(a))
    driver = Driver(runner)
    driver.drain([DiffusionRequest("a", request_id="x", seed=1, output_type="latent", **WIDE)])
    assert [one.preview.size for one in driver.reports["x"] if one.stepped] == [(24, 16)] * 2
    assert calls == []


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip


def test_a_tiny_autoencoder_takes_latents_in_the_models_scaling(tmp_path, monkeypatch) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    pipe = tiny.sd3()
    monkeypatch.setattr(type(pipe.vae), "decode", lambda self, *a, **k: pytest.fail("the model's own VAE decoded"))
    settings = {"preview_vae": str(tmp_path)}
    previews, output, _ = streamed(pipe, "latent", **WIDE, config=settings)
    expected = tiny_autoencoder().decode(output.images).sample[0]
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).detach().numpy()
    assert np.abs(np.asarray(previews[-1], np.float64) - expected).max() <= 1
    assert expected.std() > 1


def test_a_tiny_autoencoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"preview_vae='\./nowhere'"):
        Runner(tiny.sd3(), config(preview_vae="./nowhere"), in_process=True)


def test_another_autoencoder_than_a_tiny_one_for_its_latents_is_refused(tmp_path) -> None:
    pipe = tiny.sdxl()
    pipe.vae.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"preview_vae=.*no folder or hub id of an AutoencoderTiny \(it is a Auto"):
        Runner(pipe, config(preview_vae=str(tmp_path / "whole")), in_process=True)
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"latents of 16 channels, and those of AutoencoderKL have 4; give one for"):
        Runner(pipe, config(preview_vae=str(tmp_path / "wide")), in_process=True)


def test_a_pipeline_without_previews_says_so_once(monkeypatch, caplog) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("layout")

    monkeypatch.setattr(preview, "decoder_call", broken)
    monkeypatch.setattr(preview.Previewer, "_plain_call", lambda *_: None)
    previews, _, _ = streamed(tiny.sd3(), "latent", **{**WIDE, "num_inference_steps": 4})
    assert previews == [None] * 4
    assert caplog.text.count("has no previews") == 1


def quiet(case: Any, pipe: Any, runner: Runner, every: int) -> tuple[Any, list[Any]]:
    driver = Driver(runner)
    driver.drain([case.request(0, preview_every=every)])
    report = driver.finished["r0"]
    assert report.error is None, report.error
    return report.output, [one.preview for one in driver.reports["r0"] if one.stepped]


def assert_previews(name: str) -> None:
    """Every step has a picture as wide and high as is asked for, and the output is what it is without."""
    case = CASES[name]
    torch.manual_seed(0)
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    runner = Runner.from_pipeline(pipe, config())
    output, previews = quiet(case, pipe, runner, 1)
    plain, _ = quiet(case, pipe, runner, 0)
    one, other = (next(iter(o.values())) for o in (output, plain))
    if isinstance(one, str) or (isinstance(one, list) and isinstance(one[0], str)):
        assert one == other
    else:
        assert distance(one, other) <= ROUNDING
    if case.kind.endswith(UNSEEN):
        assert set(previews) == {None}
        return
    pictures = [picture for picture in previews if picture is not None]
    assert len(pictures) == len(previews) or (name.startswith(CASCADES) and pictures)
    assert all(min(picture.size) >= 8 for picture in pictures)
    params = case.request(0).params
    if {"height", "width"} <= params.keys():
        ratio = params["width"] / params["height"]
        assert all(picture.width / picture.height == pytest.approx(ratio, rel=0.3) for picture in pictures)


@pytest.mark.parametrize(
    "name", ["Flux2Pipeline", "LTX2Pipeline", "StableDiffusionPanoramaPipeline", "StableAudioPipeline"]
)
def test_previews_leave_no_trace(name: str) -> None:
    """Sums in place (panoramas), a second noise scheduler (sound), packed tokens with ids, no picture at all."""
    assert_previews(name)


def one_of_each() -> list[str]:
    """One case of each family: its packing, its statistics, its VAE. What makes no picture is among the fast ones."""
    names = sorted(
        (name for name in CASES if not CASES[name].kind.endswith(UNSEEN)), key=lambda name: (len(name), name)
    )
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(CASES[name].family, name)
    return sorted({*first.values(), "Flux2KleinKVPipeline"})  # whose end clears a cache that its steps read


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each())
def test_every_family_has_previews(name: str) -> None:
    assert_previews(name)


UNDECODED = {
    **dict.fromkeys(("ConsistencyModelPipeline", "IFPipeline", "IFSuperResolutionPipeline", "UnCLIPPipeline"),
                    "denoises pixels: there is nothing to decode"),
    **dict.fromkeys(("HiDreamImagePipeline", "Lumina2Pipeline", "PRXPipeline"),
                    "adds the VAE's shift, and the case's has none: alone, it fails likewise"),
}  # fmt: skip
"""Cases whose decoder is not called, or cannot be, and why."""

ALIKE = 0.99
"""Least correlation of the last estimate with what the pipeline ends with; found: 0.998, mostly 1."""


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    pair = torch.stack([one.double().flatten(), other.double().flatten()])
    assert bool((pair.std(dim=1) > 0).all()), "a constant proves nothing"
    return float(torch.corrcoef(pair)[0, 1])


def latents_of(call: Any) -> torch.Tensor:
    args, kwargs = call.arguments
    return (args[0] if args else next(iter(kwargs.values()))).clone()


SHOWN = sorted(name for name in CASES if not CASES[name].kind.endswith(UNSEEN))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if i % 3 else []) for i, name in enumerate(SHOWN)]
)
def test_the_last_preview_shows_what_the_pipeline_ends_with(name: str, monkeypatch) -> None:
    """The last step's estimate is what the step ends at, and the preview decodes what the pipeline decodes."""
    case, decodes = CASES[name], name not in UNDECODED
    torch.manual_seed(0)
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    ends, shown, decoded = [], [], []

    def estimate(self: Any, original: Any = noise.StepEnd.estimate) -> Any:
        ends.append((found := original(self), self.latents))
        return found

    def decoder_call(program: Any, result: Any, original: Any = preview.decoder_call) -> Any:
        call = original(program, result)
        shown.extend([] if call is None else [(call.target.name, latents_of(call))])
        return call

    def alone(self: Any, call: Any, original: Any = forwards.Forwards.alone) -> Any:
        decoded.extend([(call.target.name, latents_of(call))] if call.target.method == "decode" else [])
        return original(self, call)

    driver = Driver(Runner.from_pipeline(pipe, config()))
    for owner, own in ((noise.StepEnd, estimate), (preview, decoder_call), (forwards.Forwards, alone)):
        monkeypatch.setattr(owner, own.__name__, own)
    driver.drain([case.request(0, preview_every=1, **({"output_type": "np"} if decodes else {}))])
    assert driver.finished["r0"].error is None, driver.finished["r0"].error
    assert correlation(*ends[-1]) > ALIKE
    if decodes:
        decoder, latents = shown[-1]
        alike = [one for by, one in decoded if by == decoder and one.shape == latents.shape]
        assert max(correlation(latents, one) for one in alike) > ALIKE  # several stages, or a video in pieces


def test_the_rest_of_a_call_does_not_clear_caches_of_the_request() -> None:
    caches = GlmImageKVCache(num_layers=2)
    caches[0].store(torch.ones(1, 2), torch.ones(1, 2))
    own = rest._own(caches, cloned=False)
    assert own[0].k_caches[0] is caches[0].k_caches[0]
    own.clear()
    assert not own[0].k_caches
    assert len(caches[0].k_caches) == 1


def test_the_rest_of_a_call_does_not_change_what_it_reads() -> None:
    shared: dict[str, Any] = {"list": [1], "sum": torch.ones(2), "generator": torch.Generator().manual_seed(1)}
    state = shared["generator"].get_state()
    own = {name: rest._own(value, cloned=True) for name, value in shared.items()}
    own["list"].append(2)
    own["sum"] += 1
    torch.rand(3, generator=own["generator"])
    assert shared["list"] == [1]
    assert torch.equal(shared["sum"], torch.ones(2))
    assert torch.equal(shared["generator"].get_state(), state)
