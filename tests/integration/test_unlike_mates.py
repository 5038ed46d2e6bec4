"""Requests that differ in what they are made of, not only in values: masks or none, lists, private switches."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import tiny
import torch
from conformance.case import CASES, PROMPTS
from driving import Driver, assert_equal_to_alone, config, request

from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}


def embedded(name: str, length: int, real: int | None = None) -> Any:
    """A request of Qwen-Image with prompt embeddings, of which the first ``real`` are; None: without a mask."""
    noise = torch.Generator().manual_seed(length)
    own: dict[str, Any] = {"prompt_embeds": torch.randn(1, length, 32, generator=noise)}
    if real is not None:
        own["prompt_embeds_mask"] = (torch.arange(length) < real).long().unsqueeze(0)
    return request(name, None, length, **SMALL, **own)  # pyright: ignore[reportArgumentType]


def test_text_with_a_mask_and_without_share():
    """Qwen-Image drops masks that hide nothing: what merges has then not the same arguments."""
    mates = [embedded("a", 5), embedded("b", 9, 7), embedded("c", 9), embedded("d", 5, 3)]
    driver, _ = assert_equal_to_alone(tiny.qwen_image, mates)
    assert driver.sharing("b")[-1] == 4


def test_lists_of_prompts_of_equal_and_unequal_lengths_share():
    mates = [request("a", ["one", "two"], 1, **SMALL), request("b", ["a", "longer"], 2, **SMALL)]  # pyright: ignore
    driver, _ = assert_equal_to_alone(tiny.qwen_image, mates)
    assert driver.sharing("a")[-1] == 2


def test_the_requests_lists_stay_as_they_are():
    """Z-Image puts each prompt's chat form into the list that it was given."""
    prompts, case = ["a", "two boats"], CASES["ZImagePipeline"]
    driver = Driver(Runner.from_pipeline(case.build(), config()))
    driver.drain([case.request(0, prompt=prompts)])
    assert driver.finished["r0"].error is None
    assert prompts == ["a", "two boats"]


def grounded(i: int) -> Any:
    """Boxes are drawn in during the first ``i`` of four steps."""
    boxes = {"gligen_phrases": ["a boat"], "gligen_boxes": [[0.1, 0.1, 0.7, 0.8]]}
    settings = {"height": 16, "width": 16, "num_inference_steps": 4, "gligen_scheduled_sampling_beta": i / 4}
    return request(f"r{i}", PROMPTS[i % 3], i, **settings, **boxes)


def test_a_switch_deep_inside_a_module_is_its_requests_own():
    """GLIGEN turns its gated layers off in the middle of the call: those of one request, not of all."""

    driver, _ = assert_equal_to_alone(CASES["StableDiffusionGLIGENPipeline"].build, [grounded(i) for i in (1, 3, 2)])
    assert 2 in driver.sharing("r3")  # the ones that have theirs on, or off, at the same time
