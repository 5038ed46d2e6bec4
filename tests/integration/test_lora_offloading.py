"""LoRA per request over models whose weights wait on the host: as diffusers alone, and no weight is used while away."""

from __future__ import annotations

import pathlib
from typing import Any

import lora_files
import pytest
import tiny
import torch
from diffusers.hooks import group_offloading
from driving import Driver, alone, assert_cares, config, distance, request

from steploom import EngineConfig
from steploom.weave.lora import adapters
from steploom.weave.modules.shared import SharedModule
from steploom.weave.modules.structure import ModuleStructure
from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
TEXT = SMALL | {"max_sequence_length": 16}
FAMILIES = {"sd3": (tiny.sd3, TEXT), "flux": (tiny.flux, TEXT), "sdxl": (tiny.sdxl, SMALL)}


def offload(pipe: Any, kind: str = "leaf_level") -> Any:
    cpu = torch.device("cpu")
    blocks = 1 if kind == "block_level" else None
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=blocks)
    return pipe


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> dict[torch.Tensor, torch.Tensor]:
    """A device to be away from, where there is none: weights that are off it are NaN, and this has what they were."""
    kept: dict[torch.Tensor, torch.Tensor] = {}

    def tensors(group: Any) -> list[torch.Tensor]:
        inner = [tensor for part in group.modules for tensor in (*part.parameters(), *part.buffers())]
        return [tensor for tensor in (*inner, *group.parameters, *group.buffers) if tensor.is_floating_point()]

    def take_off(group: Any) -> None:
        for tensor in tensors(group):
            if tensor not in kept:
                kept[tensor], tensor.data = tensor.data, torch.full_like(tensor.data, torch.nan)

    def bring(group: Any) -> None:
        for tensor in tensors(group):
            if tensor in kept:
                tensor.data = kept.pop(tensor)

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", take_off)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", bring)
    return kept


def files(build: Any, root: pathlib.Path, *names: str) -> dict[str, str]:
    made = {"a": {"seed": 1}, "b": {"seed": 2}, "text": {"seed": 3, "text": True}, "dora": {"seed": 4, "dora": True}}
    return {name: lora_files.save(build, root / name, **settings) for name, settings in made.items() if name in names}


def assert_as_alone(driver: Driver, build: Any, requests: list[Any]) -> None:
    expected = {one.request_id: lora_files.alone_with_lora(build, one) for one in requests}
    assert_cares(expected, 1e-4)
    finished = driver.drain(requests)
    for name, output in expected.items():
        assert finished[name].error is None, finished[name].error.traceback
        assert distance(finished[name].output, output) <= 1e-4, name


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd3", "leaf_level"),
        *(
            pytest.param(family, kind, marks=pytest.mark.slow)
            for family, kind in [("sd3", "block_level"), ("flux", "block_level"), ("sdxl", "leaf_level")]
        ),
    ],
)
def test_requests_with_different_adapters_share_forwards(
    family: str, kind: str, tmp_path: pathlib.Path, away: dict[torch.Tensor, torch.Tensor]
):
    build, common = FAMILIES[family]
    place = files(build, tmp_path, "a", "b", "text", "dora")
    requests = [
        request("none", "a cat", 1, **common),
        request("a", "a cat", 1, lora=place["a"], **common),
        request("b", "a cat", 1, lora=(place["b"], 0.5), **common | {"num_inference_steps": 4}),
        request("text", "a cat", 1, lora=place["text"], **common),
        request("stack", "a cat", 1, lora=[(place["a"], 0.7), (place["b"], 0.4)], **common),
    ]
    if kind == "block_level":
        requests.append(request("dora", "a cat", 1, lora=place["dora"], **common))
    pipe = offload(build(), kind)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    assert driver.runner.info.no_lora is None
    assert_as_alone(driver, build, requests)
    assert driver.sharing("none")[1:] == [4, 4]
    assert driver.sharing("stack") == [1, 1, 1], "a stack is a call of its own"
    held = {id(parameter) for parameter in pipe.components["transformer" if family != "sdxl" else "unet"].parameters()}
    assert held <= {id(tensor) for tensor in away}, "what was brought to the device was taken off again"


@pytest.mark.slow
def test_adapters_come_and_go(tmp_path: pathlib.Path, away: dict[torch.Tensor, torch.Tensor]):
    place = files(tiny.sd3, tmp_path, "a", "b")
    driver = Driver(Runner.from_pipeline(offload(tiny.sd3()), config(max_loras=1)))
    for turn, name in enumerate(("a", "b", "a")):
        pair = [request(f"{turn}", "a cat", turn, lora=place[name], **TEXT), request(f"{turn}n", "x", turn, **TEXT)]
        assert_as_alone(driver, tiny.sd3, pair)
    assert driver.runner.stats().lora_evictions == 2
    assert away


@pytest.mark.slow
def test_the_attention_scale_counts(tmp_path: pathlib.Path, away: dict[torch.Tensor, torch.Tensor]):
    place = files(tiny.sd3, tmp_path, "a", "b")
    common = {"joint_attention_kwargs": {"scale": 0.5}, **TEXT}
    requests = [request(name, "a cat", 1, lora=place[name], **common) for name in ("a", "b")]
    assert_as_alone(Driver(Runner.from_pipeline(offload(tiny.sd3()), config())), tiny.sd3, requests)
    assert away


@pytest.mark.slow
def test_the_applications_own_adapters(tmp_path: pathlib.Path, away: dict[torch.Tensor, torch.Tensor]):
    place = files(tiny.sd3, tmp_path, "a", "b")
    theirs = lora_files.adapted(offload(tiny.sd3()), ((place["a"], 1.0),))
    hooks = [part.__dict__.get("_diffusers_hook") for part in theirs.transformer.modules()]
    driver = Driver(Runner.from_pipeline(theirs, config()))
    finished = driver.drain(
        [
            request("theirs", "a cat", 1, **TEXT),
            request("named", "a cat", 1, lora=("adapter_0", 0.5), **TEXT),
            request("b", "a cat", 1, lora=place["b"], **TEXT),
        ]
    )
    chosen = {"theirs": ((place["a"], 1.0),), "named": ((place["a"], 0.5),), "b": ((place["b"], 1.0),)}
    for name, given in chosen.items():
        expected = alone(lora_files.adapted(tiny.sd3(), given), request(name, "a cat", 1, **TEXT))
        assert finished[name].error is None, finished[name].error.traceback
        assert distance(finished[name].output, expected) <= 1e-4, name
    assert [part.__dict__.get("_diffusers_hook") for part in theirs.transformer.modules()] == hooks
    assert away


@pytest.mark.slow
def test_a_model_that_the_settings_offload(tmp_path: pathlib.Path):
    pipe = tiny.sd3()
    pipe.save_pretrained(tmp_path / "model")
    place = files(tiny.sd3, tmp_path, "a", "b")
    settings = {"model": str(tmp_path / "model"), "device": "cpu", "group_offload": "leaf_level", "loras": place}
    wanted = [request(name, "a cat", 1, lora=name, **TEXT) for name in ("a", "b")]
    finished = Driver(Runner.load(EngineConfig(**settings))).drain(wanted)
    for one in wanted:
        expected = alone(lora_files.adapted(pipe, ((place[one.request_id], 1.0),)), one)
        pipe.unload_lora_weights()
        assert distance(finished[one.request_id].output, expected) <= 1e-4


def test_dora_reads_weights_that_single_layers_bring(tmp_path: pathlib.Path):
    dora = lora_files.save(tiny.sd3, tmp_path / "dora", 1, dora=True)
    wanted = request("dora", "a cat", 1, lora=dora, **TEXT)
    finished = Driver(Runner.from_pipeline(offload(tiny.sd3()), config())).drain([wanted])
    assert finished["dora"].error.kind == "InvalidRequest"
    assert "serve with 'block_level'" in finished["dora"].error.message


def test_what_an_adapter_was_loaded_around_is_let_go(tmp_path: pathlib.Path):
    """Offloading makes new tensors of the model's: those would stay in host memory for as long as the adapter does."""
    pipe = tiny.sd3()
    shared = {"transformer": SharedModule("transformer", pipe.transformer)}
    adapter = adapters.load(pipe, shared, (files(tiny.sd3, tmp_path, "a")["a"], None), 1)
    layers = adapter.parts["transformer"].layers.values()
    weights = {parameter.data_ptr() for parameter in pipe.transformer.parameters()}
    assert weights.isdisjoint(parameter.data_ptr() for layer in layers for parameter in layer.parameters())


def refused(pipe: Any) -> str:
    return Runner.from_pipeline(pipe, config()).info.no_lora or ""


def test_what_adapters_would_not_follow_is_refused_with_the_mend(tmp_path: pathlib.Path):
    pipe = tiny.sd3()
    cpu = torch.device("cpu")
    pipe.transformer.transformer_blocks[0].attn.to_q.forward = lambda x: x
    assert "transformer has a forward that was set on an object (its Linear)" in refused(offload(pipe))
    pipe = tiny.sd3()
    group_offloading.apply_group_offloading(
        pipe.transformer.transformer_blocks, cpu, offload_type="leaf_level", num_blocks_per_group=1
    )
    assert "transformer is offloaded in part" in refused(pipe)
    pipe = tiny.sd3()
    pipe.transformer.enable_group_offload(cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert "leave offload_to_disk_path out" in refused(pipe)


def test_buffers_that_offloading_replaces_are_no_change_of_the_model():
    module = torch.nn.BatchNorm1d(2)
    structure = ModuleStructure(module, tensors=True)
    before = structure.now()
    module._buffers["running_mean"] = torch.zeros(2)
    assert structure.now() != before
    group_offloading.apply_group_offloading(module, torch.device("cpu"), offload_type="leaf_level")
    structure = ModuleStructure(module, tensors=True)
    before = structure.now()
    module._buffers["running_mean"] = torch.zeros(2)
    assert structure.now() == before
