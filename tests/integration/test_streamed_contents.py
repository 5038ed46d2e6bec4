"""What a stream shows is what the pipeline computes: latents, previews, trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from driving import Driver, alone, config

from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner

TEXT = {"height": 32, "width": 32, "max_sequence_length": 16}


def run(pipe, *requests: DiffusionRequest) -> Driver:
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain(requests)
    return driver


def streamed(name: str, output_type: str = "latent", steps: int = 4, **own) -> DiffusionRequest:
    params = {**TEXT, "num_inference_steps": steps}
    own = {**params, **own}
    return DiffusionRequest(name, request_id=name, seed=ord(name), output_type=output_type, **own)


def test_streamed_latents_end_in_the_result():
    driver = run(tiny.sd3(), streamed("a", latents_every=1), streamed("b", latents_every=3, steps=7))
    a = [report.latents for report in driver.reports["a"] if report.stepped]
    assert [latents.shape for latents in a] == [(1, 4, 16, 16)] * 4
    assert torch.equal(a[-1], driver.finished["a"].output.images)
    assert not torch.equal(a[0], a[1])
    steps = [(report.step, report.latents is not None) for report in driver.reports["b"] if report.stepped]
    assert steps == [(i, i % 3 == 0) for i in range(1, 8)]


def test_the_last_preview_is_the_image():
    """At the last step of a flow-matching sampler the estimate of x0 is the result."""
    pipe = tiny.sd3()
    driver = run(pipe, streamed("a", "pil", preview_every=1), streamed("b", "pil"))
    previews = [report.preview for report in driver.reports["a"] if report.stepped]
    assert [preview.size for preview in previews] == [(32, 32)] * 4
    last, image = (np.asarray(p, np.int16) for p in (previews[-1], driver.finished["a"].output.images[0]))
    assert image.std() > 1
    assert np.abs(last - image).max() <= 1
    assert np.abs(np.asarray(previews[0], np.int16) - image).max() > 1
    assert all(report.preview is None for report in driver.reports["b"])


@pytest.mark.parametrize(
    "build", [tiny.flux, tiny.qwen_image, tiny.wan, tiny.sdxl], ids=["flux", "qwen", "wan", "sdxl"]
)
def test_packed_and_video_latents_have_previews_too(build):
    size = {"height": 32, "width": 48} if build is not tiny.wan else {"height": 16, "width": 32, "num_frames": 5}
    params = {"max_sequence_length": 16} if build in (tiny.flux, tiny.wan) else {}
    own = {**size, **params, "num_inference_steps": 2, "preview_every": 2}
    request = DiffusionRequest("x", request_id="x", seed=1, output_type="latent", **own)
    driver = run(build(), request)
    assert driver.finished["x"].error is None
    (preview,) = [report.preview for report in driver.reports["x"] if report.preview is not None]
    assert preview.size == (size["width"], size["height"])


def test_large_latents_are_shown_by_a_linear_map_one_pixel_each():
    driver = run(tiny.sd3(), streamed("a", preview_every=2, steps=2, height=80, width=96))
    (preview,) = [report.preview for report in driver.reports["a"] if report.preview is not None]
    assert preview.size == (48, 40)
    assert np.asarray(preview).std() > 1


def test_trajectories():
    pipe = tiny.sd3()
    request = streamed("a", return_trajectory=True, latents_every=1)
    driver = run(pipe, request)
    report = driver.finished["a"]
    assert report.trajectory_latents.shape == (4, 1, 4, 16, 16)
    assert torch.equal(report.trajectory_latents[-1], report.output.images)
    assert torch.equal(report.trajectory_latents[0], driver.reports["a"][0].latents)
    pipe.scheduler.set_timesteps(4)
    assert torch.equal(report.trajectory_timesteps, pipe.scheduler.timesteps)
    plain = alone(pipe, streamed("a"))
    assert torch.equal(plain.images, report.output.images)


@pytest.mark.slow
def test_totals_under_strength_and_two_call_samplers():
    from diffusers import HeunDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
    from PIL import Image

    parts = {k: v for k, v in tiny.sdxl().components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts)
    image = Image.new("RGB", (32, 32), "red")
    request = DiffusionRequest("x", request_id="x", seed=1, output_type="latent", num_inference_steps=8, image=image,
                               strength=0.5)  # fmt: skip
    steps = [r for r in run(pipe, request).reports["x"] if r.stepped]
    assert [(r.step, r.total_steps) for r in steps] == [(i, 4) for i in range(1, 5)]
    heun = tiny.sdxl()
    heun.scheduler = HeunDiscreteScheduler.from_config(heun.scheduler.config)
    request = DiffusionRequest(
        "x", request_id="x", seed=1, output_type="latent", num_inference_steps=3, height=32, width=32
    )
    steps = [r for r in run(heun, request).reports["x"] if r.stepped]
    assert [r.step for r in steps] == [1, 2, 3, 4, 5]
    assert {r.total_steps for r in steps} == {5}
