"""One engine serves all tasks of a family, in shared forwards, each as diffusers' own pipeline for it does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import diffusers
import family
import numpy as np
import pytest
import tiny
import torch
from conformance import parts_sd
from driving import Driver, alone, assert_cares, config, distance

from steploom import AsyncDiffusionEngine, ConfigError, DiffusionRequest, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.worker import tasks
from steploom.worker.family import Given
from steploom.worker.models import loading
from steploom.worker.runner import Runner

FAMILIES = {
    "sd": (family.stable_diffusion, {}),
    "sdxl": (tiny.sdxl, {}),
    "sd3": (family.stable_diffusion_3, {"max_sequence_length": 16}),
    "flux": (tiny.flux, {"max_sequence_length": 16}),
}
TOLERANCE = 1e-4


def settled(driver: Driver, wanted: list[DiffusionRequest], expected: dict[str, Any]) -> None:
    """Runs the requests together; each has to come out as expected."""
    finished = driver.drain(wanted)
    for request in wanted:
        report = finished[request.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[request.request_id]) <= TOLERANCE, request.request_id


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sd")) for name in FAMILIES])
def test_each_task_equals_diffusers_own_pipeline_and_all_share_forwards(name: str) -> None:
    build, params = FAMILIES[name]
    wanted = family.requests(**params)
    expected = family.oracle(build, wanted)
    assert_cares(expected, TOLERANCE)
    driver = Driver(Runner.from_pipeline(build(), config()))
    driver.drain(family.requests("warm-up", **params))
    before = dict(driver.runner.counters.denoiser_forwards)
    settled(driver, wanted, expected)
    forwards = {n: count - before.get(n, 0) for n, count in driver.runner.counters.denoiser_forwards.items()}
    assert forwards.get(len(wanted), 0) >= 0.8 * sum(forwards.values()), forwards


def controlled(**params: Any) -> list[DiffusionRequest]:
    """A request with a ControlNet, from text and from an image, and one without for each."""
    plain: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    control, source = {"control_image": parts_sd.picture(7)}, {"image": parts_sd.picture(3), "strength": 0.5}
    made: list[DiffusionRequest] = []
    for i, (task, extra) in enumerate((
        ("controlnet", {"image": parts_sd.picture(7), "controlnet_conditioning_scale": 0.8}),
        ("text-to-image", {"height": 32, "width": 32}),
        ("image-to-image", {**source, **control, "num_inference_steps": 6}),
        ("image-to-image", {**source, "num_inference_steps": 6}),
        ("inpainting", {**source, **control, "mask_image": parts_sd.mask(1), "num_inference_steps": 6}),
    )):  # fmt: skip
        made.append(DiffusionRequest("a cat", request_id=f"{task} {i}", seed=i, task=task, **plain | extra))
    return made


CONTROLLED = (
    "StableDiffusionControlNetPipeline", "StableDiffusionPipeline", "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
)  # fmt: skip


def controlled_oracle(wanted: list[DiffusionRequest]) -> dict[str, Any]:
    components = {**family.stable_diffusion().components, "controlnet": parts_sd.controlnet()}
    expected: dict[str, Any] = {}
    for name, request in zip(CONTROLLED, wanted, strict=True):
        cls = getattr(diffusers, name)
        own = {key: value for key, value in components.items() if key in cls._get_signature_keys(cls)[0]}
        expected[request.request_id] = alone(cls(**own, requires_safety_checker=False), request)
    return expected


@pytest.mark.parametrize("given", ["to the engine", pytest.param("in the pipeline", marks=pytest.mark.slow)])
def test_a_controlnet_serves_the_family_with_and_without_it(given: str) -> None:
    wanted = controlled()
    pipe, net = family.stable_diffusion(), parts_sd.controlnet()
    if given == "in the pipeline":
        parts = {**pipe.components, "controlnet": net}
        pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        runner = Runner.from_pipeline(pipe, config())
    else:
        runner = Runner.from_pipeline(Given(pipe, net), config())
    assert [runner.info.serving(request).pipeline_class for request in wanted] == list(CONTROLLED)
    expected = controlled_oracle(wanted)
    assert_cares(expected, TOLERANCE)
    settled(Driver(runner), wanted, expected)


@pytest.mark.parametrize("misspelled", [{}, {"strengthh": 1}], ids=["right", "with a typo"])
async def test_a_control_image_may_be_called_so_where_its_pipeline_calls_it_an_image(
    misspelled: dict[str, Any],
) -> None:
    wanted = controlled()[0]
    net, settings = parts_sd.controlnet(), {**wanted.params, "seed": 0, "task": "controlnet", "output_type": "latent"}
    settings["control_image"] = settings.pop("image")
    async with AsyncDiffusionEngine.from_pipeline(family.stable_diffusion(), controlnet=net) as engine:
        if misspelled:
            with pytest.raises(InvalidRequest, match=r"strengthh: StableDiffusionControlNetPipeline .* no such"):
                await engine.generate("a cat", **settings, **misspelled)
            return
        made = await engine.generate("a cat", **settings)
        named = await engine.generate(wanted.with_id("named as diffusers does"))
    assert distance(made.output, named.output) <= TOLERANCE


def test_the_given_pipeline_stays_as_it_was() -> None:
    parts = parts_sd.parts()
    parts["scheduler"].register_to_config(skip_prk_steps=False)  # which diffusers' class for inpainting would "correct"
    parts["vae"] = parts["vae"].half()  # which from_pipe would convert
    pipe = diffusers.StableDiffusionPipeline(**parts)
    before = {name: (part, dict(part.config)) for name, part in parts.items() if name in ("unet", "vae", "scheduler")}
    runner = Runner.from_pipeline(pipe, config())
    assert "inpainting" in runner.info.tasks
    Driver(runner).drain(family.requests(tasks=["text-to-image"]))
    runner.close()
    for name, (part, settings) in before.items():
        assert getattr(pipe, name) is part
        assert dict(part.config) == settings
    assert (pipe.vae.dtype, pipe.unet.dtype) == (torch.float16, torch.float32)


def test_a_language_model_has_no_tasks_of_images() -> None:
    assert tasks.own_tasks(diffusers.DiffusionGemmaPipeline) == tasks.own_tasks(diffusers.LLaDA2Pipeline) == ()


@pytest.mark.slow
def test_a_component_that_the_application_replaces_is_replaced_in_all_tasks() -> None:
    pipe = family.stable_diffusion()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    first = family.requests("one", tasks=["image-to-image"])
    settled(driver, first, family.oracle(family.stable_diffusion, first))
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**parts_sd.BETAS)

    def build() -> Any:
        other = family.stable_diffusion()
        other.scheduler = diffusers.EulerDiscreteScheduler(**parts_sd.BETAS)
        return other

    second = family.requests("second", tasks=["image-to-image"])
    settled(driver, second, family.oracle(build, second))


def test_a_cancelled_neighbour_of_another_task_leaves_nothing_behind() -> None:
    wanted = family.requests(tasks=["text-to-image", "image-to-image"])
    expected = family.oracle(family.stable_diffusion, wanted)
    driver = Driver(Runner.from_pipeline(family.stable_diffusion(), config()))
    driver.tick([*wanted, *family.requests("gone", tasks=["inpainting", "image-to-image"])])
    for i in range(2):
        driver.cancel(f"goneinpainting {i}")
        driver.tick()
        driver.cancel(f"goneimage-to-image {i}")
    finished = driver.drain()
    for request in wanted:
        assert distance(finished[request.request_id].output, expected[request.request_id]) <= TOLERANCE
    assert driver.runner.stats().resident == 0


def test_a_unet_that_takes_the_mask_serves_inpainting_alone() -> None:
    parts = parts_sd.parts(parts_sd.ddim(), in_channels=9)
    runner = Runner.from_pipeline(diffusers.StableDiffusionInpaintPipeline(**parts), config())
    assert list(runner.info.tasks) == ["inpainting"]


def test_sizes_that_the_pipeline_refuses_are_known_before() -> None:
    for build, multiple in ((tiny.sd3, 4), (tiny.flux, 1), (family.stable_diffusion, 8)):
        pipe = build()
        info = Runner.from_pipeline(pipe, config()).info
        assert info.size_multiple == multiple  # Flux rounds what does not fit, and says so
        if multiple > 1:
            with pytest.raises(ValueError, match="divisible"):
                pipe("x", height=32 + multiple // 2, width=32, num_inference_steps=1)


def test_what_a_request_must_be_like_is_told_for_each_task() -> None:
    info = Runner.from_pipeline(family.stable_diffusion(), config()).info
    (image,) = info.tasks["image-to-image"]
    assert (info.shortened_by, image.shortened_by, image.shortened_up) == ("", "strength", False)
    assert info.output_types == image.output_types == ["latent", "np", "pil", "pt"]
    for one in (info, image):
        taken = {parameter.name: parameter.takes_none for parameter in one.parameters}
        assert not any(taken[name] for name in ("num_inference_steps", "num_images_per_prompt", "guidance_scale"))
        assert taken["negative_prompt"]
    with pytest.raises(InvalidRequest, match=r"strength=0\.01: leaves none of 50 steps"):
        check_arguments(
            DiffusionRequest("a", task="image-to-image", image=parts_sd.picture(0), strength=0.01), info, config()
        )


@pytest.mark.slow
def test_a_controlnet_that_no_pipeline_takes_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="controlnet: no pipeline of diffusers takes it with WanPipeline"):
        Runner.from_pipeline(Given(tiny.wan(), parts_sd.controlnet()), config())
    with pytest.raises(ConfigError, match="controlnet='nowhere': cannot be loaded"):
        Runner.from_pipeline(family.stable_diffusion(), config(controlnet="nowhere"))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_worker_process_serves_all_tasks_and_a_controlnet_from_files(tmp_path: Path) -> None:
    family.stable_diffusion().save_pretrained(tmp_path / "model")
    parts_sd.controlnet().save_pretrained(tmp_path / "controlnet")
    parts_sd.picture(3).save(tmp_path / "in.png")
    wanted = controlled()
    expected = controlled_oracle(wanted)
    settings = {"controlnet": str(tmp_path / "controlnet"), "torch_threads": 1, "max_batch": 8}
    outputs: dict[str, Any] = {}
    async with AsyncDiffusionEngine(model=str(tmp_path / "model"), **settings) as engine:

        async def one(request: DiffusionRequest) -> None:
            if request.params.get("strength"):
                request = request.with_params(image=tmp_path / "in.png")
            outputs[request.request_id] = await engine.generate(request)

        with pytest.raises(InvalidRequest, match="height=36: StableDiffusionPipeline takes multiples of 8"):
            await engine.generate("x", height=36)
        async with anyio.create_task_group() as group:
            for request in wanted:
                group.start_soon(one, request)
        first, second = outputs["text-to-image 1"].timings, outputs["image-to-image 3"].timings
    for request in wanted:
        assert distance(outputs[request.request_id].output, expected[request.request_id]) <= TOLERANCE
    assert min(first.mean_batch_requests, second.mean_batch_requests) > 1.3


async def test_the_demo_model_makes_an_image_from_an_image_beside_one_from_text() -> None:
    size = {"height": 32, "width": 32}
    source = np.full((32, 32, 3), 255, np.uint8)
    async with AsyncDiffusionEngine(model="demo", distributed_executor_backend="inproc") as engine:
        assert list(engine.info.tasks) == ["text-to-image", "image-to-image"]
        results: dict[str, Any] = {}

        async def one(task: str, **params: Any) -> None:
            results[task] = await engine.generate("a red circle", task=task, seed=1, **params, **size)

        for _ in range(2):  # once to learn and to verify
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: one("text-to-image", num_inference_steps=8))
                group.start_soon(lambda: one("image-to-image", num_inference_steps=16, strength=0.5, image=source))
        assert {out.timings.steps for out in results.values()} == {8}
        assert min(out.timings.mean_batch_requests for out in results.values()) >= 1.6


def test_the_largest_size_is_what_the_model_has_positions_for() -> None:
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    most = loading.describe(pipe, in_process=True).size_most
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "height": 32}
    pipe("a", width=most, **settings)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        pipe("a", width=most + 4, **settings)
