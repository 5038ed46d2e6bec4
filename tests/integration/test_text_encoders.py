"""Text encoders: identical inputs are answered from the cache, new ones of one tick share a forward."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import tiny
import torch
from conformance.case import CASES
from conformance.families import hunyuan_video, lumina, sana
from driving import Driver, alone, config, distance

from steploom.requests import DiffusionRequest
from steploom.weave import untyped
from steploom.weave.batching import unlike
from steploom.worker.runner import Runner


class Spy:
    """Counts the rows of each forward of a pipeline's text encoders."""

    def __init__(self, pipe: Any) -> None:
        self.rows: dict[str, list[int]] = defaultdict(list)
        for name, module in untyped.modules_of(pipe).items():
            if "text_encoder" in name:
                module.register_forward_pre_hook(self._saw(name), with_kwargs=True)

    def _saw(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            self.rows[name].append(len(first))

        return hook

    def take(self) -> dict[str, list[int]]:
        seen, self.rows = dict(self.rows), defaultdict(list)
        return seen


def requests(tag: str, prompts: list[str], **params: Any) -> list[DiffusionRequest]:
    settings = {**params, "num_inference_steps": 1, "output_type": "latent"}
    settings.pop("prompt", None)
    return [DiffusionRequest(prompt, request_id=f"{tag}{i}", seed=i, **settings) for i, prompt in enumerate(prompts)]


SMALL = {"height": 32, "width": 32}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLIP with projection and T5": (tiny.sd3, {**SMALL, "guidance_scale": 1.0}),
    "CLIP and T5": (tiny.flux, SMALL),
    "Qwen2.5-VL": (tiny.qwen_image, SMALL),
    "Gemma, hidden states": (lumina.lumina2, CASES["Lumina2Pipeline"].inputs(0)),
    "Gemma": (sana.text_to_image, CASES["SanaPipeline"].inputs(0)),
    "LLaMA and CLIP": (hunyuan_video.text_to_video, CASES["HunyuanVideoPipeline"].inputs(0)),
}


FAST = ("CLIP with projection and T5",)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_new_requests_of_a_tick_encode_in_one_forward(kind: str) -> None:
    build, params = KINDS[kind]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    spy, driver = Spy(pipe), Driver(Runner(pipe, config()))
    driver.drain(requests("warm", ["a cat on", "a dog in", "a fox at"], **params))
    spy.take()
    new = requests("new", ["a cow on", "a hen in", "a pig at"], **params)
    driver.drain(new)
    assert spy.take() == {name: [3] for name in spy_names(pipe)}
    driver.drain(requests("again", ["a cow on", "a hen in", "a pig at"], **params))
    assert spy.take() == {}
    for one in new:
        report = driver.finished[one.request_id]
        assert report.error is None, report.error
        assert distance(report.output, alone(pipe, one)) <= 1e-4


def warm(pipe: Any, params: dict[str, Any], **settings: Any) -> tuple[Spy, Driver]:
    """A spy on, and a driver of, a pipeline whose first calls, which are probed, are over."""
    spy, driver = Spy(pipe), Driver(Runner(pipe, config(**settings)))
    driver.drain(requests("first", ["a bird"], **params))
    spy.take()
    return spy, driver


def spy_names(pipe: Any) -> list[str]:
    return [name for name in untyped.modules_of(pipe) if "text_encoder" in name]


def test_texts_that_are_tensors_of_other_lengths_encode_alone_and_are_counted() -> None:
    pipe = tiny.qwen_image()
    spy, driver = warm(pipe, SMALL)
    driver.drain(requests("a", ["a cow", "a hen in there"], **SMALL))
    assert spy.take() == {"text_encoder": [1, 1]}
    assert (
        driver.runner.stats().alone_calls[
            f"{unlike.UNLIKE}: input_ids has another size; attention_mask has another size"
        ]
        == 2
    )


PLAIN = {**SMALL, "guidance_scale": 1.0}


def counted(driver: Driver) -> tuple[int, int]:
    stats = driver.runner.stats()
    return stats.cache_hits, stats.cache_misses


def test_the_cache_is_bounded_in_bytes_and_counts() -> None:
    pipe = tiny.sd3()
    spy, driver = warm(pipe, PLAIN, encode_cache_bytes=200_000)
    hits, misses = counted(driver)
    driver.drain(requests("cat", ["a cat"], **PLAIN))
    assert counted(driver) == (hits, misses + 3)
    driver.drain(requests("same", ["a cat"], **PLAIN))
    assert counted(driver) == (hits + 3, misses + 3)
    full = driver.runner.stats().cache_bytes
    assert 0 < full <= 200_000
    driver.drain(requests("more", [f"number {i} of many" for i in range(12)], **PLAIN))
    assert full < driver.runner.stats().cache_bytes <= 200_000
    spy.take()
    driver.drain(requests("evicted", ["a cat"], **PLAIN))
    assert spy.take() == {name: [1] for name in spy_names(pipe)}


def test_identical_texts_of_one_tick_are_encoded_once_even_if_nothing_is_kept() -> None:
    pipe = tiny.sd3()
    spy, driver = warm(pipe, PLAIN, encode_cache_bytes=10)
    hits, misses = counted(driver)
    driver.drain(requests("a", ["a cat", "a cat", "a cat"], **PLAIN))
    assert spy.take() == {name: [1] for name in spy_names(pipe)}
    assert counted(driver) == (hits + 6, misses + 3)
    assert driver.runner.stats().cache_bytes == 0


@pytest.mark.slow
def test_no_bytes_is_no_cache() -> None:
    pipe = tiny.sd3()
    spy, driver = warm(pipe, PLAIN, encode_cache_bytes=0)
    for tag in "ab":
        driver.drain(requests(tag, ["a cat"], **PLAIN))
        assert spy.take() == {name: [1] for name in spy_names(pipe)}
    assert counted(driver) == (0, 0)


@pytest.mark.slow
def test_changed_weights_are_encoded_anew() -> None:
    pipe = tiny.sd3()
    driver = Driver(Runner(pipe, config()))
    params = {**SMALL, "guidance_scale": 1.0}
    driver.drain(requests("before", ["a cat"], **params))
    with torch.no_grad():
        pipe.text_encoder_3.encoder.block[0].layer[0].SelfAttention.v.weight.mul_(-1.0)
    (again,) = requests("after", ["a cat"], **params)
    driver.drain([again])
    assert distance(driver.finished["after0"].output, alone(pipe, again)) <= 1e-4
    assert distance(driver.finished["before0"].output, driver.finished["after0"].output) > 1e-3
