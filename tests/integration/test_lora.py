"""LoRA per request: equal to diffusers alone, with different adapters in one forward where PEFT can, and bounded."""

from __future__ import annotations

import pathlib
from typing import Any

import lora_files
import pytest
import tiny
import torch
from driving import Driver, alone, assert_cares, config, distance, request
from peft.tuners.lora import LoraLayer

from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
TEXT = SMALL | {"max_sequence_length": 16}
FAMILIES = {"sd3": (tiny.sd3, TEXT), "flux": (tiny.flux, TEXT), "sdxl": (tiny.sdxl, SMALL)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters for SD3: A and B, the weak one, one with DoRA, one for the text encoder too."""
    root = tmp_path_factory.mktemp("loras")
    made = {
        "a": {"seed": 1},
        "b": {"seed": 2},
        "dora": {"seed": 3, "dora": True},
        "text": {"seed": 4, "text": True},
        "wide": {"seed": 5, "targets": ("to_q", "time_text_embed.timestep_embedder.linear_1", "proj_out")},
    }
    return {name: lora_files.save(tiny.sd3, root / name, **settings) for name, settings in made.items()}


def together(build, requests, pipe=None, **settings):
    """Runs all requests at once and compares each with diffusers alone."""
    expected = {r.request_id: lora_files.alone_with_lora(build, r) for r in requests}
    assert_cares(expected, 1e-4)
    driver = Driver(Runner.from_pipeline(build() if pipe is None else pipe, config(**settings)))
    finished = driver.drain(requests)
    for r in requests:
        report = finished[r.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[r.request_id]) <= 1e-4, r.request_id
    return driver


def spy(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The adapters in each mixed batch of a LoRA layer."""
    seen: list[set[str]] = []
    original = LoraLayer._mixed_batch_forward

    def mixed(self: Any, x: Any, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        seen.append(set(adapter_names))
        return original(self, x, *args, adapter_names=adapter_names, **kwargs)

    monkeypatch.setattr(LoraLayer, "_mixed_batch_forward", mixed)
    return seen


@pytest.mark.parametrize("family", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sdxl"))])
def test_different_adapters_share_forwards(family, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    build, common = FAMILIES[family]
    a, b = (lora_files.save(build, tmp_path / n, i, text=n == "b") for i, n in enumerate("ab"))
    requests = [
        request("none", "a cat", 1, **common),
        request("a", "a cat", 1, lora=[(a, 1.0)], **common),
        request("a, half", "a cat", 1, lora=(a, 0.5), **common),
        request("b", "a cat", 1, lora=b, **common | {"num_inference_steps": 4}),
        request("a and b", "a cat", 1, lora=[(a, 0.7), (b, 0.4)], **common),
    ]
    seen = spy(monkeypatch)
    driver = together(build, requests)
    assert driver.sharing("b") == [4, 4, 4, 1]
    assert driver.sharing("none") == [4, 4, 4]
    assert driver.sharing("a and b") == [1, 1, 1], "a stack is a call of its own, in the same ticks"
    assert max(map(len, seen)) == 4, "A, A at another scale, B and none in one forward"
    assert {report.batch_key for n in ("none", "a and b") for report in driver.reports[n][1:2]} == {
        driver.reports["none"][1].batch_key
    }, "the scheduler may put them into one tick"
    assert driver.runner.stats().lora_loads == 2


@pytest.mark.slow
def test_dora_and_equal_stacks_are_calls_of_their_own(files: dict[str, str]):
    stack = [(files["a"], 0.5), (files["b"], -0.5)]
    requests = [
        request("dora", "a cat", 1, lora=[(files["dora"], 0.8)], **TEXT),
        request("dora too", "dogs", 2, lora=[(files["dora"], 0.8)], **TEXT),
        request("stack", "a cat", 1, lora=stack, **TEXT),
        request("stack too", "dogs", 2, lora=stack, guidance_scale=1.0, **TEXT),
        request("a", "a cat", 1, lora=files["a"], **TEXT),
    ]
    driver = together(tiny.sd3, requests)
    assert driver.sharing("dora") == [2, 2, 2]
    assert driver.sharing("stack") == [2, 2, 2]


def test_rows_of_guidance_and_of_several_images(files: dict[str, str]):
    requests = [
        request("a", "a cat", 1, lora=files["a"], guidance_scale=1.0, **TEXT),
        request("b", "a cat", 1, lora=files["b"], guidance_scale=5.0, num_images_per_prompt=2, **TEXT),
        request("none", "a cat", 1, guidance_scale=4.0, **TEXT),
        request("text", "a cat", 1, lora=[(files["text"], 0.6)], num_images_per_prompt=2, guidance_scale=1.0, **TEXT),
    ]
    driver = together(tiny.sd3, requests)
    assert driver.sharing("b") == [4, 4, 4]


def test_layers_that_do_not_see_the_rows_keep_adapters_apart(files: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """A module that merges rows inside: the call is repeated apart, and right."""
    transformer = type(tiny.sd3().transformer.time_text_embed.timestep_embedder)
    original = transformer.forward

    def once(self: Any, sample: Any, *args: Any) -> Any:
        same = bool((sample == sample[:1]).all())
        out = original(self, sample[:1] if same else sample, *args)
        return out.expand(len(sample), -1) if same else out

    monkeypatch.setattr(transformer, "forward", once)
    requests = [
        request("wide", "a cat", 1, lora=[(files["wide"], 0.2)], **TEXT),
        request("none", "a cat", 1, **TEXT),
        request("wide, less", "a cat", 1, lora=[(files["wide"], 0.1)], **TEXT),
    ]
    driver = together(tiny.sd3, requests)
    assert driver.sharing("none") == [1, 1, 1]
    assert any("rows" in reason for reason in driver.runner.stats().alone_calls)


def test_an_adapter_that_reaches_other_rows_is_noticed_however_weak(monkeypatch: pytest.MonkeyPatch, tmp_path):
    weak = [lora_files.save(tiny.sd3, tmp_path / f"weak{i}", i, strength=0.02) for i in range(2)]
    original = LoraLayer._mixed_batch_forward

    def wrong(self: Any, x: Any, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        return original(self, x, *args, adapter_names=adapter_names[::-1], **kwargs)

    monkeypatch.setattr(LoraLayer, "_mixed_batch_forward", wrong)
    runner = Runner.from_pipeline(tiny.sd3(), config())
    driver = Driver(runner)
    names = (weak[0], None, weak[1])
    driver.drain([request(f"r{i}", "a cat", 1, lora=name, **TEXT) for i, name in enumerate(names)])
    assert any("an adapter reaches rows" in verdict for verdict in runner.stats().kinds.values())


@pytest.mark.slow
def test_attention_scale_multiplies_the_scale_and_leaves_no_trace(files: dict[str, str]):
    def scaled(name: str, scale: float, **more: Any) -> Any:
        return request(name, "a cat", 1, joint_attention_kwargs={"scale": scale}, **more, **TEXT)

    requests = [
        scaled("a", 0.3, lora=[(files["text"], 0.7)]),
        scaled("b", 0.3, lora=[(files["b"], 0.7)]),
        scaled("none of it", 0.0, lora=[(files["a"], 0.7)]),
        request("after", "a cat", 1, lora=[(files["a"], 0.7)], **TEXT),
    ]
    driver = together(tiny.sd3, requests)
    assert driver.sharing("b") == [2, 2, 2]
    again = driver.drain([request("again", "a cat", 1, lora=[(files["a"], 0.7)], **TEXT)])["again"]
    assert (
        torch.equal(again.output[0], driver.finished["after"].output[0])
        or distance(again.output, driver.finished["after"].output) < 1e-5
    )


@pytest.mark.parametrize("lora", [None, [("ink", 0.5)]])
def test_requests_over_adapters_of_the_application_share_with_their_like(files: dict[str, str], lora: Any):
    def build() -> Any:
        pipe = tiny.sd3()
        pipe.load_lora_weights(files["a"], adapter_name="ink")
        return pipe

    requests = [request(f"r{i}", f"a cat {i}", seed=i, **SMALL, **({"lora": lora} if lora else {})) for i in range(3)]
    driver = Driver(Runner.from_pipeline(build(), config()))
    finished = driver.drain(requests)
    for one in requests:
        assert driver.sharing(one.request_id) == [3.0] * SMALL["num_inference_steps"]
        pipe = build()
        pipe.set_adapters(["ink"], [lora[0][1] if lora else 1.0])
        assert distance(finished[one.request_id].output, alone(pipe, one)) <= 1e-4
