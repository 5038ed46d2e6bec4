"""Models whose files are broken, or do not go together, and quantizations that are none: told by setting and file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import refusal

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def narrow(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file, {"format": "pt"})


def lose_one(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file, {"format": "pt"})


def writing(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        (WEIGHTS, cut, f": {WEIGHTS} is cut off: "),
        (ENCODER, cut, f": {ENCODER} is cut off: "),
        (WEIGHTS, writing(b""), f": {WEIGHTS} is empty; copy or download it again"),
        (WEIGHTS, writing(b"nonsense" * 9), f": {WEIGHTS} is cut off, or no safetensors file (72 bytes)"),
        (WEIGHTS, writing((2).to_bytes(8, "little") + b"[]"), f": {WEIGHTS} is no safetensors file; copy"),
        (WEIGHTS, writing(b"version https://git-lfs.github.com/spec/v1\n"), f": {WEIGHTS} is a pointer of git-lfs"),
        (WEIGHTS, narrow, ": the weights do not fit the configuration; give a folder as it was saved (Cannot load bec"),
        (ENCODER, narrow, ": the weights do not fit the configuration; give a folder as it was saved ("),
        (WEIGHTS, lose_one, ": the weights of transformer lack "),
        ("tokenizer/tokenizer.json", writing(b"{"), ": tokenizer/tokenizer.json is no JSON ("),
        (
            "scheduler/scheduler_config.json",
            writing(b"[]"),
            ": scheduler/scheduler_config.json holds a list, not an ob",
        ),
    ],
)
def test_a_file_that_is_broken_is_named(name: str, harm: Any, said: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    harm(folder / name)
    found = refusal(folder)
    assert found.startswith(f"model={str(folder)!r}{said}")
    assert "ignore_mismatched_sizes=True" not in found


@pytest.mark.parametrize(("harm", "said"), [(cut, ": diffusion_pytorch_model.safetensors is cut off: "),
                                            (narrow, ": the weights do not fit the configuration"),
                                            (lose_one, ": the weights of transformer lack ")])  # fmt: skip
def test_it_is_the_components_setting_that_is_named(harm: Any, said: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model / "transformer", tmp_path / "other")
    harm(folder / "diffusion_pytorch_model.safetensors")
    found = refusal(tiny_model, components={"transformer": str(folder)})
    assert found.startswith(f"components['transformer']={str(folder)!r}{said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("one.safetensors", b"nonsense" * 9, "one.safetensors is cut off, or no safetensors file (72 bytes)"),
        ("one.ckpt", b"nonsense", "one.ckpt is no file of weights of that kind"),
        ("one.ckpt", b"", "one.ckpt is empty"),
        ("one.gguf", b"nonsense", "one.gguf is no file of weights of that kind"),
        ("one.safetensors", None, "holds no weights of that kind, or under names that diffusers does not know"),
    ],
)
def test_single_files_too(name: str, content: bytes | None, said: str, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is None:
        save_file({"x": torch.zeros(2)}, file)
    else:
        file.write_bytes(content)
    assert refusal(file, base_model=str(tiny_model)).startswith(f"model={str(file)!r}: {said}")
    found = refusal(tiny_model, components={"transformer": str(file)})
    assert found.startswith(f"components['transformer']={str(file)!r}: {said}")


def quantized(model: Path, backend: str = "torchao", **arguments: Any) -> str:
    how = {"quant_backend": backend, "quant_kwargs": arguments, "components_to_quantize": ["transformer"]}
    return refusal(model, quantization_config=how)


def test_quantizations_that_do_not_exist(tiny_model: Path) -> None:
    pytest.importorskip("torchao.quantization")
    start = "quantization_config: torchao for 'transformer'"
    typo = quantized(tiny_model, quant_type="int8_weigth_only")
    assert typo.startswith(f"{start} with quant_type='int8_weigth_only': ")
    assert typo.endswith("; did you mean 'Int8WeightOnlyConfig'?")
    assert quantized(tiny_model, quant_type=8).startswith(f"{start} with quant_type=8: is a int; give the name of a ")
    assert quantized(tiny_model, quant_type={"a": 1}).startswith(f"{start} with quant_type={{'a': 1}}: ")
    unknown = quantized(tiny_model, quant_type="int8_weight_only", group_size=32)
    assert unknown == f"{start}: TorchAoConfig does not know group_size; it takes quant_type, modules_to_not_convert"


def test_a_backend_that_is_not_installed_is_no_fault_of_the_model(tiny_model: Path) -> None:
    found = quantized(tiny_model, "quanto", weights_dtype="int8")
    assert found.startswith("quantization_config={'quant_backend': 'quanto', ")
    assert "optimum-quanto" in found
    assert found.endswith("; install what it asks for, or choose another backend")
