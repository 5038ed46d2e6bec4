"""The built-in model, run by stock diffusers alone."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

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


def test_every_word_of_the_grammar_is_one_token_and_other_text_is_not_lost() -> None:
    for tokenizer in (pipeline().tokenizer, pipeline().tokenizer_2):
        assert all(len(tokenizer(word).input_ids) == 3 for word in scene.vocabulary())
        strange = tokenizer("Zebra \u00e9 7").input_ids[1:-1]
        assert len(strange) == 8
        assert tokenizer.unk_token_id not in strange


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
