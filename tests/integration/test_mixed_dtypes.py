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
    assert said.startswith(
        f"dtype={mixed!r}: {type(build()).__name__} does not bring what it hands to the VAE, in float32, "
    )
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
        ("AnimateDiffVideoToVideoPipeline", torch.float32, False),  # which brings the VAE to the others' dtype
        ("HunyuanVideoFramepackPipeline", torch.float32, False),  # it decodes between the steps
        ("LTX2ConditionPipeline", torch.float32, False),  # it brings pictures to it in another method
        ("Cosmos2_5_PredictBasePipeline", torch.bfloat16, False),
        ("AnimateDiffPipeline", torch.float32, True),  # it decodes in a method of its own
        ("Flux2Pipeline", torch.float32, True),  # the dtype is for the picture, and not for the latents
        ("FluxControlPipeline", torch.bfloat16, True),
        ("MarigoldDepthPipeline", torch.float32, True),
        ("LTX2ImageToVideoPipeline", torch.float32, True),  # it is the picture that it does not bring to it
        ("QwenImageImg2ImgPipeline", torch.float32, True),
        ("QwenImageEditPipeline", torch.bfloat16, True),
        ("QwenImageEditPlusPipeline", torch.float32, True),  # it takes one picture, or several
        ("VisualClozePipeline", torch.float32, True),  # the pipelines do that it makes of its components
        ("KandinskyV22CombinedPipeline", torch.float32, False),
        ("ZImageControlNetPipeline", torch.float32, True),
        ("ZImagePipeline", torch.float32, False),
    ],
)
def test_a_vae_is_refused_where_its_pipeline_cannot_use_it(name: str, dtype: torch.dtype, refused: bool) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    dtypes = {"unet": other, "transformer": other, "vae": dtype}
    with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
        mixed_dtypes.refuse(getattr(diffusers, name), {}, dtypes)


def test_tasks_of_the_family_that_cannot_use_the_vae_are_not_listed(tmp_path: Path) -> None:
    tiny.qwen_image().save_pretrained(tmp_path)
    same, mixed = (load(tmp_path, {"vae": vae, "default": "bfloat16"}) for vae in ("bfloat16", "float32"))
    assert {"text-to-image", "image-to-image", "inpainting"} <= set(same.info.tasks)
    assert set(mixed.info.tasks) == {"text-to-image"}
    given: dict[str, Any] = {
        "model": str(tmp_path),
        "device": "cpu",
        "dtype": {"vae": "float32", "default": "bfloat16"},
    }
    with pytest.raises(
        ConfigError, match="QwenImageImg2ImgPipeline does not bring what it hands to the VAE, in float32"
    ):
        Runner.load(EngineConfig(task="image-to-image", **given), lambda line: None)
