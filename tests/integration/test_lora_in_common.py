"""Adapters of a component of which another has modules too: Z-Image's ControlNet is given its transformer's."""

from __future__ import annotations

import pathlib
from typing import Any

import conformance.families  # noqa: F401
import lora_files
import pytest
import torch
from conformance.case import CASES
from driving import Driver, assert_cares, config, distance, request

from steploom import InvalidRequest
from steploom.weave.lora import adapters, common
from steploom.weave.pipelines import Loom
from steploom.worker.runner import Runner

CASE = CASES["ZImageControlNetPipeline"]
SHORT: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def build() -> Any:
    torch.manual_seed(0)
    return CASE.build()


@pytest.mark.parametrize(
    ("targets", "both"),
    [(("to_q", "to_k", "to_v"), True), (("layers.0.attention.to_q",), False)],
    ids=["common", "own"],
)
def test_an_adapter_of_modules_in_common_is_for_all_that_use_them(tmp_path: pathlib.Path, targets: Any, both: bool):
    files = {name: lora_files.save(build, tmp_path / name, seed, targets=targets, strength=0.7)
             for seed, name in enumerate("AB", 1)}  # fmt: skip
    inputs = {**CASE.inputs(0), **SHORT}
    prompt = inputs.pop("prompt")
    wanted = [request(name, prompt, 1, lora=files.get(name), **inputs) for name in ("A", "B", "plain")]
    got = Driver(Runner.from_pipeline(build(), config())).drain(wanted)
    exact = {one.request_id: lora_files.alone_with_lora(build, one) for one in wanted}
    assert_cares(exact, 1e-3)
    for name, output in exact.items():
        assert got[name].error is None, got[name].error
        assert distance(got[name].output, output) <= 1e-4, name
    loom = Loom(build())
    found = adapters.load(loom.pipeline, loom.shared, (files["A"], None), 1)
    assert set(found.parts) == ({"transformer", "controlnet"} if both else {"transformer"})


def test_what_changes_a_whole_component_is_refused_where_another_has_modules_of_it():
    loom = Loom(build())
    assert common.borrowers(loom.shared, "transformer") == ["controlnet"]
    with pytest.raises(InvalidRequest, match="changes transformer in another way than by LoRA layers"):
        adapters._refuse_whole_in_common(loom.shared, ["transformer"])
    adapters._refuse_whole_in_common(loom.shared, ["vae", "text_encoder"])
