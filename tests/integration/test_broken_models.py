"""Folders and factories that give no model: each is one line that says what is wrong with it, and the mend."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from steploom import ConfigError, EngineConfig
from steploom.worker.models import loading


def refusal(model: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(EngineConfig(model=str(model), device="cpu", **settings), lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def index(**entries: Any) -> Callable[[Path], None]:
    """Puts entries into a folder's index; None takes them out."""

    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        whole = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))

    return change


def written(text: str, *path: str) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(*path).write_text(text) and None


def truncated(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            written("[]", "model_index.json"),
            "its model_index.json holds a list, not an object with a _class_name",
        ),
        (written("{", "model_index.json"), "its model_index.json cannot be read as JSON"),
        (
            index(_class_name="NoSuchPipeline", _diffusers_version="9.1"),
            f"this diffusers, {re.escape(diffusers.__version__)}, has no NoSuchPipeline .diffusers 9.1 wrote this "
            "folder.; upgrade diffusers, or give .* trust_remote_code=True",
        ),
        (index(_class_name=None), "the _class_name in its model_index.json is None, not a pipeline's"),
        (index(_class_name=["own", 3]), r"is \['own', 3\], not a pipeline's"),
        (index(_class_name=["own", "OwnPipeline"]), "names OwnPipeline of own.py, and there is no such file in it"),
        (index(_class_name="AutoencoderKL"), "could not be loaded: "),  # of diffusers, but no pipeline
        (
            index(transformer="SD3Transformer2DModel"),
            'says "SD3Transformer2DModel" of transformer, not library and',
        ),
        (index(transformer=["diffusers"]), r'says \["diffusers"\] of transformer, not library and class'),
        (index(transformer=[3, 4]), r"says \[3, 4\] of transformer, not"),
        (index(transformer=["nowhere", "Model"]), "could not be loaded: nowhere is not one of the libraries"),
        (index(scheduler=["diffusers", "NopeScheduler"]), "could not be loaded: .*has no class `NopeScheduler`"),
        (
            lambda folder: shutil.rmtree(folder / "vae"),
            "could not be loaded: .*no folder vae, which its",
        ),
        (
            written("[]", "transformer", "config.json"),
            "transformer/config.json holds a list, not an object with settings; ",
        ),
        (
            written("{", "transformer", "config.json"),
            "transformer/config.json is no JSON .*; copy or download it again",
        ),
        (truncated, r"transformer/diffusion_pytorch_model.safetensors is cut off, .*1000 bytes.; copy or download it"),
    ],
)
def test_a_broken_folder(break_it: Callable[[Path], None], words: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    break_it(folder)
    message = refusal(folder)
    assert message.startswith(f"model={str(folder)!r}: "), message
    assert re.search(words, message), message


def test_a_broken_folder_as_the_base_of_a_file_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("[]")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "one.bin")
    message = refusal(tmp_path / "one.bin", base_model=str(tmp_path / "base"))
    assert message.startswith(f"base_model={str(tmp_path / 'base')!r}: its model_index.json holds a list")


def test_a_class_of_the_hubs_that_diffusers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any, **__: Any) -> None:
        raise AttributeError("module diffusers has no attribute NewPipeline")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lacks)
    assert "has no NewPipeline; upgrade diffusers" in refusal("owner/name")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RuntimeError("PytorchStreamReader failed reading zip archive"), True),
        (RuntimeError("CUDA error: no device"), False),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), False),
        (MemoryError("no room"), False),
    ],
    ids=repr,
)
def test_what_the_device_says_is_not_the_models_fault(
    fault: Exception, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(ConfigError if told else type(fault), match=str(fault)):
        loading.load(EngineConfig(model="demo", device="cpu"), lambda _: None)


FACTORIES = """
def raises():
    raise KeyError("no\\nkey")


def device():
    raise RuntimeError("CUDA error: out of memory")


def two(config, name):
    pass
"""


def test_a_broken_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("broken_factories:raises") == (
        f"model='broken_factories:raises': raised KeyError: 'no\\nkey' ({tmp_path / 'broken_factories.py'}, line 3)"
    )
    assert refusal("broken_factories:two").endswith(
        "asks for config and name; a factory takes nothing, or the EngineConfig"
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        loading.load(EngineConfig(model="broken_factories:device", device="cpu"), lambda _: None)
