"""Requests with a ControlNet and without share forwards: a call without residuals is a call with zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
from conformance import parts_sd
from conformance.families import flux, kandinsky3, stable_diffusion_3, z_image
from diffusers import (
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    Kandinsky3Img2ImgPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    ZImageImg2ImgPipeline,
)
from driving import Driver, alone, assert_cares, config, distance

from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner

SHORT: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
SIZED: dict[str, Any] = {**SHORT, "height": 32, "width": 32}
FROM_IMAGE: dict[str, Any] = {"image": parts_sd.picture(3), "strength": 0.5, "num_inference_steps": 8}

FAMILIES: dict[str, tuple[Callable[[], Any], str, dict[str, Any], dict[str, type]]] = {
    "sdxl": (
        tiny.controlnet, "image", {},
        {"controlnet": StableDiffusionXLControlNetPipeline, "text-to-image": StableDiffusionXLPipeline,
         "image-to-image": StableDiffusionXLImg2ImgPipeline},
    ),
    "flux": (
        flux.controlnet, "control_image", {"max_sequence_length": 16},
        {"controlnet": FluxControlNetPipeline, "text-to-image": FluxPipeline, "image-to-image": FluxImg2ImgPipeline},
    ),
    "sd3": (
        stable_diffusion_3.control, "control_image", {"max_sequence_length": 16},
        {"controlnet": StableDiffusion3ControlNetPipeline, "text-to-image": StableDiffusion3Pipeline},
    ),
}  # fmt: skip


def wanted(name: str, kind: str) -> list[DiffusionRequest]:
    _, control, params, tasks = FAMILIES[name]
    extra: dict[str, Any] = {"controlnet": {control: parts_sd.picture(7)}, "image-to-image": FROM_IMAGE}
    return [
        DiffusionRequest(
            "a cat", request_id=f"{kind}{i}", seed=i, task=task,
            **{**(SHORT if task == "image-to-image" and name == "sdxl" else SIZED), **params, **extra.get(task, {})},
        )
        for i, task in enumerate(tasks)
    ]  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sdxl")) for name in FAMILIES])
def test_requests_with_and_without_a_controlnet_share_forwards(name: str) -> None:
    build, _, _, tasks = FAMILIES[name]
    pipe = build()
    requests = wanted(name, "r")
    expected = {
        request.request_id: alone(cls.from_pipe(pipe) if cls is not type(pipe) else pipe, request)
        for request, cls in zip(requests, tasks.values(), strict=True)
    }
    assert_cares(expected, 1e-4)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain(wanted(name, "warm-up"))
    before = dict(driver.runner.counters.denoiser_forwards)
    finished = driver.drain(requests)
    for request in requests:
        report = finished[request.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[request.request_id]) <= 1e-4, request.request_id
    together = driver.runner.counters.denoiser_forwards.get(len(requests), 0) - before.get(len(requests), 0)
    assert together == 4, driver.runner.counters.denoiser_forwards
    keys = {report.batch_key for one in requests for report in driver.reports[one.request_id]}
    assert len(keys) == 1, "the scheduler lets them share ticks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "kandinsky3"])
def test_siblings_that_want_tuples_share_with_siblings_that_want_outputs(name: str) -> None:
    build = {"z-image": z_image.text_to_image, "kandinsky3": kandinsky3.text_to_image}[name]
    pipe = build()
    sibling = {"z-image": ZImageImg2ImgPipeline, "kandinsky3": Kandinsky3Img2ImgPipeline}[name].from_pipe(pipe)
    size = {"height": 32, "width": 32} if name == "z-image" else {"height": 64, "width": 64}
    picture = parts_sd.picture(3).resize((32, 32) if name == "z-image" else (16, 16))  # latents of the same size
    more = {**size} if name == "z-image" else {}

    def both(kind: str) -> list[DiffusionRequest]:
        return [
            DiffusionRequest(
                "a cat", request_id=f"{kind}0", seed=1, task="text-to-image", num_inference_steps=4,
                output_type="latent", **size,
            ),
            DiffusionRequest(
                "a cat", request_id=f"{kind}1", seed=2, task="image-to-image", image=picture, strength=0.5,
                num_inference_steps=8, output_type="latent", **more,
            ),
        ]  # fmt: skip

    requests = both("r")
    expected = {one.request_id: alone(own, one) for one, own in zip(requests, (pipe, sibling), strict=True)}
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain(both("warm-up"))
    before = driver.runner.counters.denoiser_forwards.get(2, 0)
    finished = driver.drain(requests)
    for one in requests:
        assert finished[one.request_id].error is None, finished[one.request_id].error
        assert distance(finished[one.request_id].output, expected[one.request_id]) <= 1e-4
    assert driver.runner.counters.denoiser_forwards.get(2, 0) - before >= 4
