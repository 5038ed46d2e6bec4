"""Requests for tasks of a family, as the engine checks them before any work."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeExecutor, fake_engine

from steploom import EngineConfig, InvalidRequest, codec
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.worker.messages import Ready, ToEngine


def info(name: str, *optional: str, required: tuple[str, ...] = (), **fields: Any) -> PipelineInfo:
    known = ("prompt", "num_inference_steps", "height", "width", *optional)
    parameters = [*(Parameter(one) for one in known), *(Parameter(one, required=True) for one in required)]
    return PipelineInfo(pipeline_class=name, parameters=parameters, **fields)


PLAIN = info("P", size_multiple=16)
FROM_IMAGE = info("PImg2Img", "strength", required=("image",), size_multiple=8)
INPAINT = info("PInpaint", "strength", required=("image", "mask_image"))
CONTROL = info("PControlNet", required=("control_image",))
CONTROL_IMAGE = info("PControlNetImg2Img", "strength", required=("image", "control_image"))
FAMILY = info(
    "P",
    size_multiple=16,
    tasks={
        "text-to-image": [PLAIN, CONTROL],
        "image-to-image": [FROM_IMAGE, CONTROL_IMAGE],
        "inpainting": [INPAINT],
        "controlnet": [CONTROL, CONTROL_IMAGE],
    },
)


def request(task: str | None = None, **params: Any) -> DiffusionRequest:
    return DiffusionRequest("a cat", task=task, **params)


@pytest.mark.parametrize(
    ("task", "arguments", "served_by"),
    [
        (None, {}, "P"),
        ("text-to-image", {}, "P"),
        ("txt2img", {}, "P"),
        ("text-to-image", {"control_image": 1}, "PControlNet"),
        ("image-to-image", {"image": 1}, "PImg2Img"),
        ("img2img", {"image": 1, "strength": 0.5}, "PImg2Img"),
        ("image-to-image", {"image": 1, "control_image": 1}, "PControlNetImg2Img"),
        ("inpainting", {"image": 1, "mask_image": 1}, "PInpaint"),
        ("inpaint", {"image": 1, "mask_image": 1}, "PInpaint"),
        ("controlnet", {"control_image": 1}, "PControlNet"),
        ("controlnet", {"control_image": 1, "image": 1}, "PControlNetImg2Img"),
    ],
)
def test_the_plainest_pipeline_that_takes_the_arguments_serves(task, arguments, served_by):
    assert FAMILY.serving(request(task, **arguments)).pipeline_class == served_by
    check_arguments(request(task, **arguments), FAMILY, EngineConfig())


@pytest.mark.parametrize(
    ("task", "arguments", "field", "message"),
    [
        ("inpaintin", {}, "task", "task='inpaintin': .* did you mean 'inpainting'"),
        ("text-to-video", {}, "task", "P and its family serve 'text-to-image', 'image-to-image', 'inpainting'"),
        ("upscaling", {}, "task", r"EngineConfig\(task='upscaling'\) over a model that has it, or leave it out"),
        (None, {"image": 1}, "image", "P has no such argument; did you mean task='image-to-image'"),
        (None, {"image": 1, "mask_image": 1}, "image", "did you mean task='inpainting'"),
        ("text-to-image", {"strength": 0.5}, "strength", r"P \(task='text-to-image'\) .* did you mean task='image-"),
        ("image-to-image", {}, "image", "PImg2Img .* requires it; give image=..., a PIL image"),
        ("image-to-image", {"image": None}, "image", "requires it"),
        ("inpainting", {"image": 1}, "mask_image", "requires it"),
        ("image-to-image", {"imagee": 1}, "imagee", "did you mean image"),
        ("image-to-image", {"control_image": 1}, "image", "PControlNetImg2Img .* requires it; give image=..., a PIL"),
        ("img2img", {"image": 1, "strengthh": 1}, "strengthh", "did you mean strength"),
        (None, {"width": 100}, "width", r"width=100: P takes multiples of 16; the nearest is 96 or 112"),
        (None, {"height": 8}, "height", r"height=8: P takes multiples of 16; the nearest is 16"),
        ("image-to-image", {"image": 1, "height": 20}, "height", "multiples of 8; the nearest is 16 or 24"),
        (None, {"num_inference_steps": 1001}, "num_inference_steps", "at most 1000"),
    ],
)
def test_what_no_pipeline_of_the_family_takes_is_refused_with_the_mend(task, arguments, field, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_arguments(request(task, **arguments), FAMILY, EngineConfig())
    assert caught.value.field == field


def test_a_size_for_which_the_model_has_no_positions_is_refused():
    with pytest.raises(InvalidRequest, match="height=112: this P has positions for at most 96") as caught:
        check_arguments(request(height=112, width=96), info("P", size_multiple=16, size_most=96), EngineConfig())
    assert caught.value.field == "height"


def test_a_size_that_one_task_refuses_may_suit_another():
    check_arguments(request("image-to-image", image=1, width=24), FAMILY, EngineConfig())
    check_arguments(request("inpainting", image=1, mask_image=1, width=25), FAMILY, EngineConfig())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("prior_num_inference_steps", 9, "=9"),
        ("timesteps", list(range(9)), ": 9 steps"),
        ("sigmas", [0.5] * 9, ": 9 steps"),
    ],
)
def test_all_that_says_how_many_steps_there_are_is_limited(name, value, said):
    with pytest.raises(InvalidRequest, match=f"{name}{said}: at most 8") as caught:
        check_arguments(request(**{name: value}), info("P", name), EngineConfig(max_steps=8))
    assert caught.value.field == name


class FamilyExecutor(FakeExecutor):
    async def _init_executor(self, on_progress: Any) -> PipelineInfo:
        await super()._init_executor(on_progress)
        return FAMILY


async def test_the_engine_refuses_before_anything_is_queued_and_serves_the_rest():
    async with fake_engine(FamilyExecutor) as (engine, executor):
        with pytest.raises(InvalidRequest, match="did you mean task='image-to-image'"):
            await engine.generate("a cat", image="no-such-file.png")  # before the file is looked for
        assert not executor.log
        assert (await engine.generate("a cat", task="text-to-image")).images == ["a cat"]


def test_the_tasks_of_a_family_reach_the_engine_over_the_wire():
    answer = codec.decode(codec.encode(ToEngine(Ready(FAMILY))), ToEngine).answer
    assert answer == Ready(FAMILY)


def test_a_missing_controlnet_is_asked_for_by_its_setting() -> None:
    lacking = info("P", tasks={"text-to-image": [PLAIN]})
    with pytest.raises(InvalidRequest, match=r"give the engine a ControlNet that fits: EngineConfig\(controlnet="):
        check_arguments(request("controlnet"), lacking, EngineConfig())


def test_an_empty_list_of_prompts_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt=\[\]: is empty; give at least one prompt"):
        check_arguments(DiffusionRequest([]), FAMILY, EngineConfig())
