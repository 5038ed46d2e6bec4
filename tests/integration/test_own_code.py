"""Components whose folders bring their class along: served if it is trusted, in place of others, and quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from test_loading import assert_serves_as, load, refusal

from steploom import ConfigError
from steploom.worker.models import component_classes
from steploom.worker.models.component_classes import Place

CODE = """
from diffusers import SD3Transformer2DModel


class OwnTransformer(SD3Transformer2DModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return (out[0] * 0.5,) if isinstance(out, tuple) else type(out)(sample=out.sample * 0.5)
"""
INT8 = {
    "quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8_weight_only"},
    "components_to_quantize": ["transformer"],
}  # fmt: skip


def changed(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose transformer is of a class of its own."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("own") / "model")
    (folder / "transformer" / "own_transformer.py").write_text(CODE)
    changed(folder / "transformer" / "config.json", _class_name="OwnTransformer")
    changed(folder / "model_index.json", transformer=["own_transformer", "OwnTransformer"])
    return folder


@pytest.fixture
def mapped(own: Path, tmp_path: Path) -> Path:
    """The transformer alone, in a folder whose configuration says where its class is."""
    folder = shutil.copytree(own / "transformer", tmp_path / "mapped")
    changed(folder / "config.json", auto_map={"AutoModel": "own_transformer.OwnTransformer"})
    return folder


def ending(folder: Path) -> str:
    return f"{str(folder)!r} brings Python code along (own_transformer.py), which would run here; read it, and"


def test_it_is_quantized_as_any_other(own: Path) -> None:
    pytest.importorskip("torchao.quantization")
    runner, _ = load(own, quantization_config=INT8, trust_remote_code=True)
    assert type(runner.pipeline.transformer).__name__ == "OwnTransformer"
    assert type(runner.pipeline.transformer.proj_out.weight).__name__.startswith("Int8")
    said = refusal(own, quantization_config=INT8)
    assert said.startswith(f"trust_remote_code=False: model={ending(own)}")


@pytest.mark.parametrize("way", ["model", "component", pytest.param("mapped", marks=pytest.mark.slow)])
def test_it_takes_the_place_of_another(way: str, own: Path, mapped: Path, tiny_model: Path) -> None:
    folder = {"model": own, "component": own / "transformer", "mapped": mapped}[way]
    runner, _ = load(tiny_model, components={"transformer": str(folder)}, trust_remote_code=True)
    assert type(runner.pipeline.transformer).__name__ == "OwnTransformer"
    assert_serves_as(runner, checkpoints.load(own, trust_remote_code=True))
    said = refusal(tiny_model, components={"transformer": str(folder)})
    assert said.startswith(f"trust_remote_code=False: components['transformer']={ending(folder)}")


@pytest.mark.parametrize("trusted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_takes_its_place(trusted: bool, own: Path, tiny_model: Path) -> None:
    runner, _ = load(own, components={"transformer": str(tiny_model)}, trust_remote_code=trusted)
    assert_serves_as(runner, checkpoints.load(tiny_model))


def test_a_class_that_is_nowhere_is_told_of_the_component(own: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own / "transformer", tmp_path / "bare")
    (folder / "own_transformer.py").unlink()
    said = refusal(tiny_model, components={"transformer": str(folder)}, trust_remote_code=True)
    assert said.startswith(f"components['transformer']={str(folder)!r}: its configuration names OwnTransformer, which ")
    assert '"auto_map": {"AutoModel": "FILE.OwnTransformer"}' in said


def test_code_that_does_not_run_is_told_of_the_component(mapped: Path, tiny_model: Path) -> None:
    (mapped / "own_transformer.py").write_text("raise KeyError('gone')\n")
    said = refusal(tiny_model, components={"transformer": str(mapped)}, trust_remote_code=True)
    assert said.startswith(
        f"components['transformer']={str(mapped)!r}: OwnTransformer of its own_transformer.py cannot "
    )
    assert "KeyError: 'gone'" in said


def test_an_index_does_not_say_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stepped_on.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match="stepped_on is not one of the libraries"):
        component_classes.of_index(Place(str(folder), "", "model='x'", {}, True), "stepped_on", "Any")
    with pytest.raises(ConfigError, match="trust_remote_code=False: model='x' brings"):
        component_classes.of_index(Place("owner/name", "", "model='x'", {}, False), "stepped_on", "Any")
