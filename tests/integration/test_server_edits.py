"""Edits over a pretended engine: how far from the picture, from how many, and what a client is told that asks for less
than nothing."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import openai
import pytest
from conformance.case import CASES
from PIL import Image
from serving import file_of, listening, openai_client, sdk

from steploom import AsyncDiffusionEngine, StepEvent
from steploom._pretended import pictures
from steploom.server import create_app
from steploom.server.image_generation import _due

PICTURE = file_of(Image.new("RGB", (64, 64), "red"))


@pytest.mark.parametrize("strength", [0, -0.5, 1.5])
async def test_strength_is_a_share(strength: float) -> None:
    async with openai_client() as (client, _):
        with pytest.raises(openai.BadRequestError, match="at most 1") as caught:
            await client.images.edit(image=PICTURE, prompt="a", extra_body={"strength": strength})
        assert caught.value.param == "strength"


@pytest.mark.parametrize(
    ("total", "most", "steps"),
    [(24, 3, [1, 9, 17]), (20, 2, [1, 11]), (20, 1, [1]), (4, 3, [1, 2, 3]), (2, 3, [1]), (None, 2, [1, 2])],
)
def test_the_first_preview_is_that_of_the_first_step(total: int | None, most: int, steps: list[int]) -> None:
    shown: list[int] = []
    for step in range(1, total or 9):  # the last step's would be the image itself
        event = StepEvent(request_id="a", step=step, total_steps=total)
        if _due(event, len(shown), most):
            shown.append(step)
    assert shown == steps


async def test_what_the_pipeline_fails_on_is_the_clients_fault_only_if_it_is() -> None:
    """Over a real one: two pictures where it takes one, and one that it cannot bring to any size."""
    pipe = CASES["StableDiffusionImg2ImgPipeline"].build()
    async with (
        AsyncDiffusionEngine.from_pipeline(pipe) as engine,
        listening(create_app(engine)) as address,
        sdk(address) as client,
    ):
        few: Any = {"prompt": "a", "extra_body": {"num_inference_steps": 2}}
        dot = file_of(Image.new("RGB", (1, 1)))
        for given, words in (([PICTURE, PICTURE], "2 pictures for 1 prompt; send one"), (dot, "1x1 pixels; make it")):
            with pytest.raises(openai.BadRequestError, match=words) as caught:
                await client.images.edit(image=given, **few)
            assert caught.value.param == "image"
        assert (await client.images.edit(image=PICTURE, **few)).data
    async with openai_client() as (client, _):
        with pytest.raises(openai.InternalServerError):
            await client.images.edit(image=[PICTURE, PICTURE], prompt="fail")


async def test_a_pipeline_that_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "images", lambda *_: [])
    async with openai_client() as (client, _):
        with pytest.raises(openai.InternalServerError, match="made no image") as caught:
            await client.images.generate(prompt="a")
        assert caught.value.code == "generation_failed"


@pytest.mark.parametrize(
    ("shown", "asked", "size"),
    [((48, 32), {}, "96x64"), ((8, 8), {}, "64x64"), ((10, 30), {}, "10x30"), ((48, 32), {"size": "32x32"}, "32x32")],
)
async def test_previews_have_the_shape_of_the_image_that_they_become(
    shown: tuple[int, int], asked: dict[str, Any], size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "picture", lambda *_: Image.new("RGB", shown))
    async with openai_client() as (client, _):
        wide = file_of(Image.new("RGB", (96, 64)))
        stream = await client.images.edit(image=wide, prompt="a", stream=True, partial_images=1, **asked)
        sizes = [event.size async for event in stream]
        assert sizes[0] == size
