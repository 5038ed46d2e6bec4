"""Every way to name a model, each against what diffusers itself loads."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from driving import Driver, alone, assert_cares, distance, request
from safetensors.torch import save_file

from steploom import ConfigError, EngineConfig
from steploom.worker.models import left_out
from steploom.worker.runner import Runner


def load(model: Path | str, **settings: Any) -> tuple[Runner, list[str]]:
    lines: list[str] = []
    return Runner.load(EngineConfig(model=str(model), device="cpu", **settings), lines.append), lines


def assert_serves_as(runner: Runner, pipe: Any, tolerance: float = 1e-4, **params: Any) -> None:
    """The runner's requests, together, equal the pipeline alone."""
    params = {"num_inference_steps": 3, "height": 32, "width": 32, **params}
    requests = [request("a", "a red cat", 1, **params), request("b", "blue dogs", 2, **params)]
    expected = {one.request_id: alone(pipe, one) for one in requests}
    assert_cares(expected, tolerance)
    finished = Driver(runner).drain(requests)
    for one in requests:
        report = finished[one.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[one.request_id]) <= tolerance


def refusal(model: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(model, **settings)
    return str(caught.value)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of a variant, too."""
    folder = tmp_path_factory.mktemp("sd")
    pipe = checkpoints.stable_diffusion()
    pipe.save_pretrained(folder)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    pipe.save_pretrained(folder, variant="half")
    return folder


@pytest.fixture(scope="module")
def single_file(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline's weights in one file, in the layout in which Stable Diffusion was published."""
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(checkpoints.original_layout(checkpoints.load(stable_diffusion)), file)
    return file


def test_a_folder_is_loaded_component_by_component(stable_diffusion: Path) -> None:
    runner, lines = load(stable_diffusion)
    assert_serves_as(runner, checkpoints.load(stable_diffusion))
    assert any(line.startswith("loading unet (UNet2DConditionModel), ") for line in lines), lines


@pytest.mark.slow
def test_a_variant_is_the_weights_of_that_name(stable_diffusion: Path) -> None:
    runner, _ = load(stable_diffusion, variant="half")
    assert_serves_as(runner, checkpoints.load(stable_diffusion, variant="half"))
    assert refusal(stable_diffusion, variant="fp4").startswith("variant='fp4': model=")


def test_weights_of_a_variant_alone_are_told(stable_diffusion: Path, tmp_path: Path) -> None:
    half = shutil.copytree(stable_diffusion, tmp_path / "half")
    for plain in (*half.glob("*/*model.safetensors"), *half.glob("*/*model.bin")):
        plain.unlink()
    assert "has weights of variant='half' alone; give that" in refusal(half)
    load(half, variant="half")


def test_a_single_file_holds_all_weights(single_file: Path, stable_diffusion: Path) -> None:
    runner, _ = load(single_file, base_model=str(stable_diffusion))
    assert runner.info.pipeline_class == "StableDiffusionPipeline"
    assert_serves_as(runner, checkpoints.load(stable_diffusion))


@pytest.mark.slow
def test_a_single_file_beside_an_index_needs_no_base(single_file: Path, stable_diffusion: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()
    shutil.copy(stable_diffusion / "unet" / "config.json", folder / "unet")
    runner, _ = load(shutil.copy(single_file, folder))
    assert_serves_as(runner, checkpoints.load(stable_diffusion))


@pytest.mark.slow
def test_components_come_from_elsewhere_or_are_left_out(tmp_path: Path, tiny_model: Path) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    other = SD3Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    tiny.scaled(other, 1.0, seed=9).save_pretrained(tmp_path / "other")
    runner, _ = load(tiny_model, components={"transformer": str(tmp_path / "other"), "text_encoder_3": None})
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_model, transformer=other, text_encoder_3=None)
    assert runner.pipeline.text_encoder_3 is None
    assert_serves_as(runner, pipe)
    assert "components['unet']: " in refusal(tiny_model, components={"unet": str(tmp_path / "other")})
    typo = refusal(tiny_model, components={"transfomer": str(tmp_path / "other")})
    assert "components['transfomer']: " in typo
    assert "did you mean 'transformer'?" in typo
    assert "no such file" in refusal(tiny_model, components={"transformer": str(tmp_path / "none")})


@pytest.mark.parametrize(("name", "other", "said"), [
    ("vae", "unet", "is a folder of UNet2DConditionModel, a model that neither is a ControlNet nor decodes; the pip"),
    ("unet", "vae", "is a folder of AutoencoderKL, an autoencoder; the pipeline wants a model that neither"),
    ("unet", "scheduler", "is a folder of PNDMScheduler, a noise scheduler; the pipeline wants a model that"),
])  # fmt: skip
def test_a_component_of_another_kind_is_refused(name: str, other: str, said: str, stable_diffusion: Path) -> None:
    assert said in refusal(stable_diffusion, components={name: str(stable_diffusion / other)})


def test_what_is_no_controlnet_is_refused_as_one(stable_diffusion: Path) -> None:
    said = refusal(stable_diffusion, controlnet=str(stable_diffusion / "vae"))
    assert "is a folder of AutoencoderKL, an autoencoder; give one of a ControlNet" in said


@pytest.mark.parametrize("name", ["safety_checker", "image_encoder", "feature_extractor"])
def test_a_component_that_is_not_there_may_be_left_out(name: str, stable_diffusion: Path) -> None:
    """As ``from_pretrained(..., safety_checker=None)``, whether or not the folder has one."""
    assert json.loads((stable_diffusion / "model_index.json").read_text())[name] == [None, None]
    runner, _ = load(stable_diffusion, components={name: None})
    assert_serves_as(runner, checkpoints.load(stable_diffusion))
    assert "no such component" in refusal(stable_diffusion, components={name: str(stable_diffusion / "unet")})
    typo = refusal(stable_diffusion, components={f"{name}s": None})
    assert f"components['{name}s']: " in typo
    assert f"did you mean '{name}'?" in typo


@pytest.mark.parametrize("name", ["unet", "scheduler", "tokenizer"])
def test_what_no_request_can_do_without_cannot_be_left_out(
    name: str, stable_diffusion: Path, single_file: Path
) -> None:
    said = refusal(stable_diffusion, components={name: None})
    assert said.startswith(f"components['{name}']=None: StableDiffusionPipeline makes nothing without it")
    if name != "unet":
        assert said == refusal(single_file, base_model=str(stable_diffusion), components={name: None})


def test_text_encoders_may_be_left_out_where_embeddings_are_given(stable_diffusion: Path) -> None:
    runner, _ = load(stable_diffusion, components={"text_encoder": None, "tokenizer": None})
    embeds = torch.randn(1, 77, runner.pipeline.unet.config.cross_attention_dim, generator=torch.manual_seed(0))
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "num_inference_steps": 2}
    one = request("a", None, 1, height=32, width=32, **given)
    pipe = checkpoints.load(stable_diffusion)
    finished = Driver(runner).drain([one])["a"]
    assert finished.error is None, finished.error
    assert distance(finished.output, alone(pipe, one)) <= 1e-4


@pytest.mark.parametrize(("given", "refused"), [
    ({"transformer_2": None}, False), ({"transformer": None}, False),
    ({"transformer": None, "transformer_2": None}, True),
    ({"vae": None}, False), ({"scheduler": None}, True), ({"tokenizer": None}, True),
    ({"tokenizer": None, "text_encoder": None}, False), ({"image_encoder": None}, False),
])  # fmt: skip
def test_of_two_denoisers_one_may_be_left_out(given: dict[str, None], refused: bool) -> None:
    index = {name: ["diffusers", "Any"] for name in ("transformer", "transformer_2", "vae", "scheduler", "tokenizer",
                                                     "text_encoder", "image_encoder")}  # fmt: skip
    index |= {"_class_name": "WanImageToVideoPipeline", "image_encoder": [None, None]}
    with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
        for name in given:
            left_out.refuse(name, given, index)


def test_each_component_can_have_a_dtype(tiny_model: Path) -> None:
    runner, _ = load(tiny_model, dtype={"text_encoder": "bfloat16", "default": "float32"})
    assert runner.pipeline.text_encoder.dtype is torch.bfloat16
    assert runner.pipeline.vae.dtype is torch.float32
    typo = refusal(tiny_model, dtype={"vea": "float32", "default": "bfloat16"})
    assert typo.startswith("dtype['vea']='float32': ")
    assert typo.endswith("has no such component; did you mean 'vae'?")
    assert ", but default, scheduler, text_encoder" in refusal(tiny_model, dtype={"unheard": "float32"})


FACTORIES = """
import tiny

def plain():
    return tiny.sd3()

def configured(config):
    assert config.max_batch == 3
    return tiny.sd3()

def wrong():
    return tiny.sd3().transformer
"""


def test_a_factory_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    runner, _ = load("tiny_factories:plain")
    assert_serves_as(runner, tiny.sd3())
    assert load("tiny_factories:configured", max_batch=3)[0].info.pipeline_class == "StableDiffusion3Pipeline"
    assert load("tiny_factories:plain", dtype="bfloat16")[0].info.dtype == "bfloat16"
    assert "gave diffusers.models" in refusal("tiny_factories:wrong")
    assert "has no function 'missing'" in refusal("tiny_factories:missing")
    assert "there is no module 'tiny_nowhere'" in refusal("tiny_nowhere:plain")
    assert "is a factory" in refusal("tiny_factories:plain", variant="fp16")


@pytest.mark.slow
def test_group_offloading_changes_nothing_but_where_weights_are(tiny_model: Path) -> None:
    pipe = checkpoints.load(tiny_model)
    for how in ("leaf_level", {"offload_type": "block_level", "num_blocks_per_group": 1, "exclude_modules": ["vae"]}):
        runner, _ = load(tiny_model, group_offload=how)
        from steploom.worker.models.loading import is_group_offloaded

        assert is_group_offloaded(runner.pipeline.transformer)
        assert_serves_as(runner, pipe)
    assert "'blocks' is none of" in refusal(tiny_model, group_offload={"blocks": 1})
    assert "exclude_modules names 'vea', and Stable" in refusal(tiny_model, group_offload={"exclude_modules": ["vea"]})
    assert "use_stream needs a CUDA device" in refusal(tiny_model, group_offload={"use_stream": True})
    assert "onload_device is not device='cpu'" in refusal(tiny_model, group_offload={"onload_device": "meta"})


@pytest.mark.slow
def test_the_vae_decodes_in_tiles_or_slices(tiny_model: Path) -> None:
    runner, _ = load(tiny_model, vae_tiling=True, vae_slicing=True)
    assert runner.pipeline.vae.use_tiling
    assert runner.pipeline.vae.use_slicing
    pipe = checkpoints.load(tiny_model)
    pipe.vae.enable_tiling()
    assert_serves_as(runner, pipe, output_type="pt", height=80, width=80)


@pytest.mark.slow
def test_an_attention_backend_is_diffusers_own(tiny_model: Path) -> None:
    runner, _ = load(tiny_model, attention_backend="_native_math")
    pipe = checkpoints.load(tiny_model)
    pipe.transformer.set_attention_backend("_native_math")
    assert_serves_as(runner, pipe)
    assert refusal(tiny_model, attention_backend="nonsense").startswith("attention_backend='nonsense': ")


@pytest.mark.slow
def test_code_that_a_model_brings_along_runs_only_if_it_is_trusted(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "own_pipeline.py").write_text(
        "from diffusers import StableDiffusion3Pipeline\n\n\nclass OwnPipeline(StableDiffusion3Pipeline):\n    pass\n"
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["own_pipeline", "OwnPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert message.startswith("trust_remote_code=False: ")
    assert "set trust_remote_code=True" in message
    assert load(folder, trust_remote_code=True)[0].info.pipeline_class == "OwnPipeline"


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("no/such/folder", {}, "must be 'demo', a folder, a hub id"),
        ("./nowhere", {}, "model='./nowhere': there is no such file or folder here"),
        ("nowhere.safetensors", {}, "there is no such file or folder here"),
        ("demo", {"revision": "main"}, "revision='main': model='demo' is a folder"),
        ("demo", {"base_model": "a/b"}, "base_model='a/b': model='demo' is a folder"),
        ("demo", {"task": "painting"}, "task='painting': one of text-to-image"),
        ("demo", {"group_offload": "leaf_level", "compile": True}, "group_offload='leaf_level' with compile=True"),
        ("demo", {"quantization_config": {"backend": "torchao"}}, "give {'quant_backend'"),
        (
            "demo",
            {"quantization_config": {"quant_backend": "nonsense", "components_to_quantize": ["transformer"]}},
            "the backend 'nonsense' for 'transformer'",
        ),
        (
            "demo",
            {"quantization_config": {"quant_backend": "torchao", "components_to_quantize": ["unet"]}},
            "the model has no component 'unet' with weights",
        ),
        ("demo", {"quantization_config": {"quant_method": "gguf"}}, "GGUF files are quantized already"),
        (
            "demo",
            {"quantization_config": {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}},
            "bitsandbytes",
        ),
        ("owner/name", {"local_files_only": True}, "local_files_only=True: model='owner/name' is not"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(model: str, settings: dict[str, Any], words: str) -> None:
    assert words in refusal(model, **settings)


def test_folders_and_files_that_are_no_models_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    for name, setting in (("transformer", "transformer"), ("vae", "vae"), ("text_encoder", "text_encoder")):
        said = refusal(tiny_model / name)
        assert "holds one component" in said
        assert f"components={{{setting!r}: " in said
    assert "but tiny-sd3" in refusal(tiny_model.parent) or "holds no model_index.json" in refusal(tiny_model.parent)
    (tmp_path / "notes.txt").write_text("no model")
    assert "is a file, but no checkpoint" in refusal(tmp_path / "notes.txt")
    assert "give a folder written by save_pretrained" in refusal(tmp_path)
    (tmp_path / "modular_model_index.json").write_text("{}")
    assert "is a modular pipeline (modular_model_index.json), and those are not served" in refusal(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    assert refusal(tmp_path / "odd.safetensors").startswith("base_model=None: it is not known which model")


def test_a_pipeline_of_one_s_own_has_no_other_tasks(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["own_pipeline", "OwnPipeline"]}))
    (folder / "own_pipeline.py").write_text("raise SystemExit('nobody trusts this')")
    for trusted in (False, True):
        said = refusal(folder, task="text-to-image", trust_remote_code=trusted)
        assert said.startswith("task='text-to-image': model=")
        assert said.endswith("leave task out")


def test_offline_a_single_file_asks_for_what_it_does_not_hold(single_file: Path) -> None:
    said = refusal(single_file, local_files_only=True)
    assert said.startswith("base_model=None: model=")
    assert "is one file" in said


def test_a_given_pipeline_is_never_modified() -> None:
    pipe = tiny.sd3()
    for settings in (
        {"group_offload": "leaf_level"}, {"vae_tiling": True}, {"variant": "fp16"}, {"dtype": "bfloat16"},
        {"quantization_config": {"quant_backend": "torchao"}}, {"components": {"vae": None}}, {"device": "meta"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Runner.from_pipeline(pipe, EngineConfig(**settings))
    assert sys.modules["torch"] is torch
