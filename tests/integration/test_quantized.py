"""Quantized models: torchao and GGUF as diffusers loads them, in this process and over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_loading import assert_serves_as, load, refusal

from steploom import ConfigError, EngineConfig
from steploom.executor import MultiprocExecutor
from steploom.worker.messages import Configure

torchao_quantization = pytest.importorskip("torchao.quantization")
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    checkpoints.flux_wide().save_pretrained(folder)
    return folder


def quantized_by_diffusers(folder: Path) -> Any:
    from diffusers import FluxTransformer2DModel, TorchAoConfig

    how = TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())
    transformer = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=how, torch_dtype=torch.float32
    )
    return checkpoints.load(folder, transformer=transformer)


INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}


def ways() -> dict[str, Any]:
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    one = TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())
    return {
        "a config object": one,
        "a pipeline's object": PipelineQuantizationConfig(quant_mapping={"transformer": one}),
        "its arguments": {
            "quant_backend": "torchao",
            "quant_kwargs": {"quant_type": "int8_weight_only"},
            "components_to_quantize": ["transformer"],
        },
        "a mapping": {"quant_mapping": {"transformer": INT8}},
    }


OTHER_WAYS = [
    pytest.param(way, marks=pytest.mark.slow) for way in ("a config object", "a pipeline's object", "a mapping")
]


@pytest.mark.parametrize("way", ["its arguments", *OTHER_WAYS])
def test_torchao_is_diffusers_own(flux: Path, way: str) -> None:
    config = EngineConfig(model=str(flux), device="cpu", quantization_config=ways()[way])
    restored = Configure.of(config).restore()  # as a worker process gets it
    for given in (config.quantization_config, restored.quantization_config):
        runner, _ = load(flux, quantization_config=given)
        assert type(runner.pipeline.transformer.proj_out.weight).__name__.startswith("Int8")
        assert type(runner.pipeline.text_encoder_2.shared.weight) is torch.nn.Parameter
        if way != "a config object":
            break
    assert_serves_as(runner, quantized_by_diffusers(flux))


@pytest.mark.slow
def test_quantization_is_of_all_components_where_none_is_named(flux: Path) -> None:
    how = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8_weight_only"}}
    runner, _ = load(flux, quantization_config=how)
    encoder = runner.pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
    assert type(encoder).__name__.startswith("Int8")


@pytest.mark.slow
def test_a_gguf_file_replaces_the_transformer(flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    file = tmp_path / "flux-Q8_0.gguf"
    checkpoints.write_gguf(checkpoints.load(flux).transformer.state_dict(), file)
    how = GGUFQuantizationConfig(compute_dtype=torch.float32)
    transformer = FluxTransformer2DModel.from_single_file(
        str(file), config=str(flux), subfolder="transformer", quantization_config=how, torch_dtype=torch.float32
    )
    pipe = checkpoints.load(flux, transformer=transformer)
    runner, _ = load(flux, components={"transformer": str(file)})
    assert type(runner.pipeline.transformer.proj_out).__name__ == "GGUFLinear"
    assert_serves_as(runner, pipe)
    runner, _ = load(file, base_model=str(flux), quantization_config=how)
    assert_serves_as(runner, pipe)
    both = {"quant_backend": "torchao", "components_to_quantize": "transformer",
            "quant_kwargs": {"quant_type": "int8_weight_only"}}  # fmt: skip
    assert "a GGUF file is quantized already" in refusal(file, base_model=str(flux), quantization_config=both)


def test_a_missing_package_is_named(flux: Path) -> None:
    how = {
        "quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True},
        "components_to_quantize": ["transformer"],
    }  # fmt: skip
    assert "bitsandbytes" in refusal(flux, quantization_config=how)


def test_what_cannot_travel_is_refused_before_a_worker_starts() -> None:
    how = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": object()}}
    with pytest.raises(ConfigError, match=r"quantization_config=.*cannot travel to a worker process"):
        MultiprocExecutor(EngineConfig(quantization_config=how))


@pytest.mark.slow
def test_a_quantized_whole_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pipe = checkpoints.stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    save_file(checkpoints.original_layout(pipe), tmp_path / "whole.safetensors")
    how = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8_weight_only"}}
    message = refusal(tmp_path / "whole.safetensors", base_model=str(tmp_path / "base"), quantization_config=how)
    assert "is a whole pipeline in one file, which diffusers does not quantize" in message
