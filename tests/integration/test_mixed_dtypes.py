"""Dtypes by component: a VAE in another than the denoiser's, where the pipeline cannot decode with that."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch

from steploom import ConfigError, EngineConfig
from steploom.worker.models import mixed_dtypes
from steploom.worker.runner import Runner


def load(folder: Path, dtype: dict[str, str]) -> Runner:
    return Runner.load(EngineConfig(model=str(folder), device="cpu", dtype=dtype), lambda line: None)


@pytest.mark.parametrize("build", [tiny.sd3, tiny.sdxl, tiny.flux, tiny.wan, tiny.qwen_image])
def test_a_vae_of_another_dtype_is_refused_where_the_pipeline_would_fail_at_the_end(tmp_path: Path, build: Any) -> None:
    build().save_pretrained(tmp_path)
    mixed = {"vae": "float32", "default": "bfloat16"}
    if build in (tiny.wan, tiny.qwen_image):  # which bring their latents to the VAE's
        runner = load(tmp_path, mixed)
        assert runner.pipeline.vae.dtype is torch.float32
        return
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, mixed)
    said = str(refused.value)
    assert said.startswith(f"dtype={mixed!r}: {type(build()).__name__} hands the denoiser's latents, in bfloat16, to")
    assert said.endswith("give both one dtype, such as 'bfloat16'")


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("StableDiffusionXLPipeline", torch.float16, False),  # which brings a VAE of float16 to float32
        ("StableDiffusionXLPipeline", torch.float32, True),
        ("StableDiffusionPipeline", torch.float32, True),
        ("StableDiffusionXLImg2ImgPipeline", torch.float32, False),
        ("StableDiffusionXLInpaintPipeline", torch.float32, False),
        ("StableDiffusionUpscalePipeline", torch.float32, False),
        ("Cosmos3OmniPipeline", torch.float32, False),
        ("CosmosVideoToWorldPipeline", torch.float32, False),
        ("WanVACEPipeline", torch.float32, False),
        ("AnimateDiffPipeline", torch.float32, False),  # it decodes elsewhere, and nothing is said of it
    ],
)
def test_no_vae_is_refused_that_its_pipeline_can_use(name: str, dtype: torch.dtype, refused: bool) -> None:
    dtypes = {"unet": torch.bfloat16, "transformer": torch.bfloat16, "vae": dtype}
    with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
        mixed_dtypes.refuse(getattr(diffusers, name), {}, dtypes)
