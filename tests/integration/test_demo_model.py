"""The built-in model, run by stock diffusers alone."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from steploom import demo
from steploom.demo import checker, scene

TRAINING = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "train_demo"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@functools.cache
def pipeline() -> Any:
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(prompts: list[str], side: int = 64, steps: int = 16) -> np.ndarray:
    images = pipeline()(
        prompts,
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=5.0,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(place) for place in range(len(prompts))],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def test_a_plain_load_gives_a_stock_pipeline_in_float32() -> None:
    pipe = pipeline()
    assert type(pipe) is StableDiffusion3Pipeline
    for name in PARTS:
        assert {value.dtype for value in getattr(pipe, name).parameters()} == {torch.float32}, name


def test_the_folder_is_small() -> None:
    files = [file for file in demo.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 11.5e6


def as_clip(tokenizer: Any) -> CLIPTokenizer:
    """The tokenizer that the model was trained with: CLIP's own, of the same vocabulary, which changes no words."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length)


def test_every_prompt_of_the_grammar_keeps_the_tokens_of_training() -> None:
    rng = np.random.default_rng(5)
    scenes = [scene.random_scene(rng, held_out=bool(place % 2)) for place in range(1000)]
    prompts = ["", *map(scene.prompt, scenes), *(scene.loose_prompt(one, rng) for one in scenes)]
    for tokenizer in (pipeline().tokenizer, pipeline().tokenizer_2):
        trained = as_clip(tokenizer)
        assert all(len(trained(word).input_ids) == 3 for word in scene.vocabulary()), "one token each"
        assert tokenizer(prompts, padding="max_length").input_ids == trained(prompts, padding="max_length").input_ids
        assert tokenizer.decode(tokenizer(prompts[1]).input_ids, skip_special_tokens=True).strip() == prompts[1]


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        ("A large red circle above a small blue square, on a white background.",
         "a large red circle above a small blue square on a white background"),
        ("An orange star over the big gray-ish ring!", "a orange star above a large gray ring"),
        ("a picture of a heart on top of a ring", "a heart above a ring"),
        ("a heart is underneath two rings", "a heart below ring"),
        ("a red disk and a violet star", "a red circle to the left of a purple star"),
        ("a red circle, a white star", "a red circle to the left of a white star"),
        ("a star next to a heart, grey background", "a star to the left of a heart on gray background"),
        ("a star on the right side of the heart", "a star to the right of a heart"),
        ("a star on the left and a heart on the right", "a star to the left of a heart"),
        ("On a black background: a star atop a heart", "a star above a heart on a black background"),
        ("a star over a white background", "a star on a white background"),
        ("a star sitting on a square on pink", "a star above a square on pink background"),
        ("Gro\u00dfer \u661f \U0001f534 7, to the", ""),
    ],
)  # fmt: skip
def test_prompts_are_put_into_words_of_the_grammar(asked: str, read: str) -> None:
    for tokenizer in (pipeline().tokenizer, pipeline().tokenizer_2):
        assert tokenizer(asked).input_ids == as_clip(tokenizer)(read).input_ids


def test_the_training_script_makes_these_tokenizers_and_saving_keeps_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import models

    models.build_tokenizer().save_pretrained(tmp_path / "made")
    pipeline().save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    for name in ("tokenizer", "tokenizer_2"):
        shipped = json.loads((demo.path() / name / "tokenizer.json").read_text())
        assert json.loads((tmp_path / "made" / "tokenizer.json").read_text()) == shipped
        assert json.loads(getattr(again, name).backend_tokenizer.to_str())["normalizer"] == shipped["normalizer"]


def test_training_is_not_resumed_for_another_number_of_steps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import dit
    import vae

    monkeypatch.setattr(dit.signal, "signal", lambda *_: None)
    dit.Trainer(tmp_path, None, 14).save()
    with pytest.raises(SystemExit, match=r"--steps 40: .*step 0 for --steps 14, .*; give --steps 14, or"):
        dit.Trainer(tmp_path, None, 40)
    assert dit.Trainer(tmp_path, None, 14).schedule.steps == 14
    monkeypatch.setattr(vae, "show", lambda *_: None)
    with torch.enable_grad():  # whatever ran before
        vae.train(tmp_path, 1)
    with pytest.raises(SystemExit, match=r"--vae-steps 2: .*step 1 for --vae-steps 1, .*; give --vae-steps 1"):
        vae.train(tmp_path, 2)
    vae.train(tmp_path, 1)


def test_training_reads_prompts_as_the_text_encoders_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import models

    encoder = pipeline().text_encoder
    ids = pipeline().tokenizer(["", "a star", demo.EXAMPLE_PROMPT], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        stock = encoder(ids, output_hidden_states=True)
        before, pooled = models.read(encoder, ids)
    assert torch.equal(before, stock.hidden_states[-2])
    assert torch.equal(pooled, stock.text_embeds)


def test_training_without_a_compiler_says_so_and_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import models

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert models.compiled(torch.add) is torch.add
    said = began(monkeypatch, tmp_path)
    assert "no C++ compiler (g++, or what CXX names): training goes without" in capsys.readouterr().out
    assert said == "the first stage"
    monkeypatch.delenv("CXX")
    began(monkeypatch, tmp_path)
    assert capsys.readouterr().out == ""


def began(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, *argv: str) -> str:
    """Why the training script ended, at its first stage or before."""
    monkeypatch.syspath_prepend(str(TRAINING))
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--folder", str(folder), "--threads", "1", *argv])
    monkeypatch.setattr(train.vae, "build", functools.partial(sys.exit, "the first stage"))
    with pytest.raises(SystemExit) as ended:
        train.main()
    return str(ended.value)


@pytest.mark.parametrize("argv", ["--threads 0", "--vae-steps -1", "--steps 0", "--steps many"])
def test_training_refuses_numbers_that_make_no_sense(
    argv: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = argv.split()
    assert began(monkeypatch, tmp_path, option, value) == "2"
    assert f"argument {option}: {value!r}: must be an integer of at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_training_says_its_defaults_and_an_example(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert began(monkeypatch, tmp_path, "--help") == "0"
    said = capsys.readouterr().out
    for default in (".train", "900", "14000", "2"):
        assert f"(default: {default})" in said
    assert "python benchmarks/train_demo/train.py --export" in said


@pytest.mark.parametrize("name", ["vae.pt", "latents.pt", "bank.pt", "dit.pt"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_checkpoint_of_training_is_named_with_the_mend(
    name: str, share: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import bank
    import common
    import vae

    file = tmp_path / name
    common.save_atomically({"weights": torch.zeros(1000), "scenes": {}}, file)
    assert common.load_if_there(file).keys() == {"weights", "scenes"}
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    readers = {"vae.pt": lambda: vae.train(tmp_path, 1), "bank.pt": lambda: bank.build(tmp_path, None, 0.0, 1.0)}
    if name in readers:
        with pytest.raises(SystemExit) as ended:
            readers[name]()
        said = str(ended.value)
    else:
        said = began(monkeypatch, tmp_path)
    assert said.startswith(f"{file}: is damaged, and cannot be read (")
    assert re.search(r"; delete it.* to have it made anew, or give another --folder$", said)
    assert ("bank.pt and dit.pt, which were made with it" in said) == (name == "vae.pt")


@pytest.mark.parametrize("columns", [96, 16, 8])
def test_matrices_are_made_orthogonal_in_five_rounds(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long matrices go through all rounds at once; that equals the rounds one by one."""
    monkeypatch.syspath_prepend(str(TRAINING))
    import optim

    update = torch.randn(3, 8, columns, generator=torch.Generator().manual_seed(0))
    x = update.double() / update.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(optim.orthogonal(update).double(), x, rtol=0, atol=1e-5)


def test_the_default_size_is_64_pixels() -> None:
    image = pipeline()(demo.EXAMPLE_PROMPT, num_inference_steps=1, max_sequence_length=8).images[0]
    assert image.size == (64, 64)


def test_it_obeys_held_out_prompts() -> None:
    rng = np.random.default_rng(77)
    scenes = [scene.random_scene(rng, held_out=True) for _ in range(8)]
    pictures = draw([scene.prompt(one) for one in scenes])
    verdicts = [checker.check(picture, one) for picture, one in zip(pictures, scenes, strict=True)]
    assert sum(one.content and one.relation for one in verdicts) >= 6


@pytest.mark.parametrize("side", [32, 48, 96])
def test_it_runs_at_other_sizes(side: int) -> None:
    picture = draw([demo.EXAMPLE_PROMPT], side)[0]
    assert picture.shape == (side, side, 3)
    assert checker.read(picture).background == "white"


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 256])
def test_one_raised_token_weighs_as_many_zero_ones(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut of training (one zero token whose logit is raised) equals the stock model."""
    monkeypatch.syspath_prepend(str(TRAINING))
    import models

    pipe = pipeline()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 16, 16, generator=generator)
    level = torch.tensor([0.3, 0.8])
    prompts = [demo.EXAMPLE_PROMPT, "a star"]
    context, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=count
    )
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=models.TEXT_TOKENS, return_tensors="pt").input_ids
    quick = models.Trained(pipe.tokenizer)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(quick, name).load_state_dict(getattr(pipe, name).state_dict())
    quick.eval().transformer.set_attn_processor(models.OneZeroToken())
    with torch.no_grad():
        stock = pipe.transformer(latents, context, pooled, level * 1000, return_dict=False)[0]
        ours = quick(latents, level, ids, models.zero_token_bias(64, count))
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)
