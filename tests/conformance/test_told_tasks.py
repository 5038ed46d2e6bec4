"""Tasks that the family of a pipeline is said to do: each is done by the pipeline that is told for it, or not told."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import numpy as np
import pytest
from conformance.case import CASES, Case
from conformance.families import kandinsky, qwen_image
from conformance.parts_flux import mask, picture
from diffusers import DDPMScheduler, KandinskyV22InpaintCombinedPipeline

from steploom.config import EngineConfig
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.worker.family import Family
from steploom.worker.trials import trial

SIZE, FRAMES = 32, 9
INPAINTING = "QwenImageControlNetInpaintPipeline"
PICTURES = ("image", "video", "mask_image", "mask", "control_image", "control_mask")
"""Arguments that are given only where a task needs them."""

BY_TORCHVISION = {("Cosmos2_5_PredictBasePipeline", "image-to-video")}
"""Classes and tasks for which diffusers reads the picture with torchvision."""


def brought(name: str, given: Mapping[str, Any]) -> Any:
    """A picture, mask or video of the size that the case asks for; its own, if it has one."""
    if name in given:
        return given[name]
    size = (given.get("width") or SIZE, given.get("height") or SIZE)
    if "mask" in name:
        return mask(0).resize(size)
    frames = given.get("num_frames") or given.get("video_length") or FRAMES
    return [picture(i).resize(size) for i in range(frames)] if name == "video" else picture(0).resize(size)


def inputs(case: Case, task: str) -> dict[str, Any]:
    """What a case of the class asks for that brings a picture, or none, as the task does; its own if there is none."""
    others = [other for other in CASES.values() if other.pipeline == case.pipeline]
    pictured = not task.startswith("text")
    return next((one for one in (o.inputs(0) for o in (case, *others)) if ("image" in one) == pictured), case.inputs(0))


def asked(case: Case, task: str, info: PipelineInfo) -> DiffusionRequest:
    """A request for what ``info`` says it needs, and of the rest what the case gives but pictures."""
    known = {parameter.name: parameter for parameter in info.parameters}
    given = inputs(case, task)
    arguments = {name: value for name, value in given.items() if name in known and name not in PICTURES}
    source = "mask" if task == "inpainting" else task.partition("-to-")[0]
    wanted = [name for name in PICTURES if name in known and (known[name].required or name.startswith(source))]
    arguments |= {name: brought(name, given) for name in wanted}
    if case.steps_name in known:  # of which an image-to-image task takes a part
        arguments[case.steps_name] = 2 * case.steps[0] if "strength" in known else case.steps[0]
    return DiffusionRequest(request_id="one", seed=1, **{"output_type": "latent", **arguments})


def done(case: Case, told: Family) -> None:
    """Does every task by every pipeline that is told for it."""
    for task, members in told.info.tasks.items():
        for info in members:
            member = told.member(info.pipeline_class)
            if (info.pipeline_class, task) in BY_TORCHVISION and find_spec("torchvision") is None:
                continue
            member.set_progress_bar_config(disable=True)
            found = list(trial.arrays(trial.run_alone(member, asked(case, task, info))))
            assert found, (task, info.pipeline_class)
            assert all(np.isfinite(array).all() for array in found), (task, info.pipeline_class)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_task_that_is_told_is_done(name: str) -> None:
    done(CASES[name], Family(CASES[name].build(), EngineConfig()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("ChromaPipeline", {"text-to-image", "image-to-image"}),  # whose class for inpainting asks for another model
        ("Cosmos2VideoToWorldPipeline", {"image-to-video", "video-to-video"}),
        ("FluxFillPipeline", {"inpainting"}),
        ("I2VGenXLPipeline", {"image-to-video"}),
        ("JoyImageEditPipeline", {"text-to-image", "image-to-image"}),  # which draws where there is nothing to edit
        ("KandinskyCombinedPipeline", {"text-to-image", "image-to-image"}),
        ("KandinskyV22CombinedPipeline", {"text-to-image", "image-to-image"}),
        ("KandinskyV22Pipeline", set()),  # from embeddings
        ("LTXConditionPipeline", {"text-to-video", "image-to-video", "video-to-video"}),
        ("SanaVideoPipeline", {"text-to-video"}),
        ("StableCascadePriorPipeline", set()),  # to embeddings
        ("StableDiffusionAdapterPipeline", {"text-to-image"}),
        ("StableDiffusionInstructPix2PixPipeline", {"image-to-image"}),
        ("StableDiffusionXLImg2ImgPipeline", {"image-to-image", "inpainting"}),  # a refiner
        ("StableDiffusionUpscalePipeline", {"image-to-image"}),
        ("VisualClozePipeline", {"image-to-image"}),
    ],
)
def test_what_a_model_cannot_do_is_not_told(name: str, tasks: set[str]) -> None:
    assert set(Family(CASES[name].build(), EngineConfig()).info.tasks) == tasks


def test_what_a_task_needs_is_told() -> None:
    """The image of an adapter has a default, and must be given all the same."""
    (info,) = Family(CASES["StableDiffusionAdapterPipeline"].build(), EngineConfig()).info.tasks["text-to-image"]
    assert {one.name for one in info.parameters if one.required} >= {"image"}


def test_a_kandinsky_for_inpainting_inpaints() -> None:
    unet = kandinsky.image_unet(in_channels=9)
    parts = {**kandinsky.combined_parts(), "unet": unet, "scheduler": DDPMScheduler(clip_sample=False)}
    told = Family(KandinskyV22InpaintCombinedPipeline(**parts), EngineConfig())
    assert set(told.info.tasks) == {"inpainting"}
    done(CASES["KandinskyV22CombinedPipeline"], told)


@pytest.mark.parametrize(("extra", "classes"), [(0, {"QwenImageControlNetPipeline"}), (4, {INPAINTING})])
def test_a_controlnet_that_takes_a_mask_inpaints_and_no_other_does(extra: int, classes: set[str]) -> None:
    case = CASES["QwenImageControlNetPipeline"]
    net = qwen_image.controlnet(extra_condition_channels=extra)
    told = Family(CASES["QwenImagePipeline"].build(), EngineConfig(), controlnet=net)
    assert {info.pipeline_class for info in told.info.tasks["controlnet"]} == classes
    done(case, told)
