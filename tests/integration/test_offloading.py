"""Pipelines whose weights wait on the host: as alone, shared, and nobody changes the modules that all use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conformance.case import CASES
from driving import Driver, alone, assert_cares, assert_equal_to_alone, config, distance, request

from steploom import AsyncDiffusionEngine, EngineConfig, GenerationFailed
from steploom.worker.runner import Runner

import conformance.families  # noqa: F401  # isort: skip - fills CASES

SMALL = {"height": 32, "width": 32}
TEXT = {**SMALL, "max_sequence_length": 16}
VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
STEPS = {"num_inference_steps": 4}


def offload(pipe: Any, kind: str = "leaf_level") -> Any:
    cpu = torch.device("cpu")
    blocks = 1 if kind == "block_level" else None
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=blocks)
    return pipe


def trio(**common: Any) -> list[Any]:
    return [
        request("a", "a cat", 1, num_inference_steps=4, **common),
        request("b", "dogs", 2, num_inference_steps=6, **common),
        request("c", "x", 3, num_inference_steps=5, **common),
    ]


@pytest.mark.parametrize("kind", ["leaf_level", pytest.param("block_level", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("build", "common"),
    [
        pytest.param(tiny.sd3, TEXT, id="sd3"),
        pytest.param(tiny.sdxl, SMALL, id="sdxl"),
        pytest.param(tiny.flux, TEXT, id="flux", marks=pytest.mark.slow),
        pytest.param(tiny.wan, VIDEO, id="wan", marks=pytest.mark.slow),
    ],
)
def test_offloaded_pipelines_are_as_alone_and_share(build: Any, common: dict[str, Any], kind: str):
    driver, _ = assert_equal_to_alone(lambda: offload(build(), kind), trio(**common))
    assert driver.sharing("a") == [3, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "common"), [(tiny.sdxl, SMALL), (tiny.flux, TEXT), (tiny.wan, VIDEO)])
def test_a_loaded_model_is_offloaded_as_the_settings_say(build: Any, common: dict[str, Any], tmp_path: Path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    requests = trio(**common)
    expected = {one.request_id: alone(pipe, one) for one in requests}
    assert_cares(expected, 1e-4)
    runner = Runner.load(EngineConfig(model=str(tmp_path), device="cpu", group_offload="leaf_level"))
    driver = Driver(runner)
    finished = driver.drain(requests)
    for name, output in expected.items():
        assert finished[name].error is None, finished[name].error.traceback
        assert distance(finished[name].output, output) <= 1e-4
    assert driver.sharing("a") == [3, 3, 3, 3]


@pytest.mark.slow
def test_pag_without_its_guidance():
    driver, _ = assert_equal_to_alone(lambda: offload(tiny.sdxl_pag()), trio(pag_scale=0.0, **SMALL))
    assert driver.sharing("a") == [3, 3, 3, 3]


def test_who_changes_an_offloaded_module_fails_alone():
    pipe = offload(tiny.sdxl_pag())
    processors = pipe.unet.attn_processors
    plain = request("plain", "a cat", 1, pag_scale=0.0, **STEPS, **SMALL)
    expected = alone(pipe, plain)
    finished = Driver(Runner.from_pipeline(pipe, config())).drain([request("pag", "a", 2, **STEPS, **SMALL), plain])
    assert "serve it without offloading" in finished["pag"].error.message
    assert distance(finished["plain"].output, expected) <= 1e-4
    assert pipe.unet.attn_processors == processors


def set_attribute(unet: Any) -> None:
    for part in unet.modules():
        if hasattr(part, "output_scale_factor"):
            part.output_scale_factor = 2.0


def set_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").set_processor(
        PAGIdentitySelfAttnProcessor2_0()
    )


def set_hook(unet: Any) -> None:
    next(unet.children()).register_forward_hook(lambda module, args, output: output * 0.5)


def set_in_a_list(unet: Any) -> None:
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale[0] = 0.0


def set_on_a_processor(unet: Any) -> None:
    for processor in unet.attn_processors.values():
        processor.noted = True


@pytest.mark.parametrize("change", [set_attribute, set_processor, set_hook, set_in_a_list, set_on_a_processor])
@pytest.mark.parametrize("raises", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_what_a_callback_sets_on_an_offloaded_module_is_undone(change: Any, raises: bool):
    case = CASES["StableDiffusionPipeline-ip-adapter"]
    torch.manual_seed(0)
    pipe = offload(case.build())
    plain = {**case.inputs(0), "seed": 1, "output_type": "latent", **STEPS}
    inputs = {name: value for name, value in plain.items() if name not in ("prompt", "seed", "output_type")}
    expected = alone(pipe, request("plain", plain["prompt"], 1, **inputs))

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            change(pipe.unet)
            if raises:
                raise ValueError("of its own")
        return values

    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        with pytest.raises(GenerationFailed, match="of its own" if raises else "serve it without offloading"):
            await engine.generate(**plain, callback_on_step_end=callback)
        out = await engine.generate(**plain)
    assert distance(out.output, expected) <= 1e-4
    assert distance(alone(pipe, request("plain", plain["prompt"], 1, **inputs)), expected) == 0.0
