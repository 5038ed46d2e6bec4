"""Assembles the stock pipeline from the trained parts, draws samples with it, and writes it in half precision."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import torch
import vae
from common import Checkpoint, load_if_there
from diffusers import StableDiffusion3Pipeline
from models import (
    Trained,
    build_scheduler,
    build_silent_encoder,
    build_silent_tokenizer,
    build_tokenizer,
)
from PIL import Image

from steploom.demo import checker, scene

SAMPLES = 16
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def assemble(folder: pathlib.Path, averages: dict[str, torch.Tensor]) -> StableDiffusion3Pipeline:
    """Return the pipeline, in float32, of averaged weights and of ``vae.pt`` and ``latents.pt`` in ``folder``."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        trained = Trained(tokenizer)
        autoencoder = vae.build()
    trained.load_state_dict(averages)
    figures = load_if_there(folder / "latents.pt")
    state = load_if_there(folder / "vae.pt")
    if figures is None or state is None:
        raise FileNotFoundError(f"no trained autoencoder in {folder}; run train.py first")
    autoencoder.load_state_dict(state["model"])
    autoencoder.register_to_config(shift_factor=figures["shift"], scaling_factor=figures["factor"])
    return StableDiffusion3Pipeline(
        transformer=trained.transformer.eval(),
        scheduler=build_scheduler(),
        vae=autoencoder.eval(),
        text_encoder=trained.text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=trained.text_encoder_2.eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=build_silent_encoder().eval(),
        tokenizer_3=build_silent_tokenizer(),
    )


@torch.no_grad()
def sample_sheet(pipe: StableDiffusion3Pipeline, file: pathlib.Path, steps: int = 16) -> str:
    """Save a sheet of held-out prompts, drawn, and return what the checker says of it."""
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(11)
    scenes = [scene.random_scene(rng, held_out=True) for _ in range(SAMPLES)]
    pictures = pipe(
        [scene.prompt(one) for one in scenes],
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    drawn = (pictures * 255).round().astype(np.uint8)
    truth = np.stack([scene.draw(one, rng) for one in scenes])
    half = SAMPLES // 2
    rows = [drawn[:half], truth[:half], drawn[half:], truth[half:]]
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(file)
    verdicts = [checker.check(picture, one) for picture, one in zip(drawn, scenes, strict=True)]
    names = ("background", "shape", "colour", "size", "relation", "content")
    return ", ".join(f"{name} {sum(getattr(one, name) for one in verdicts)}/{SAMPLES}" for name in names)


def export(pipe: StableDiffusion3Pipeline, target: pathlib.Path) -> int:
    """Write a pipeline to ``target`` file by file, each replaced whole; return its size in bytes.

    Weights are float16; the text encoders' configurations say float32, so that a plain load gives float32 throughout.
    Names of classes are those that older versions of transformers know, too. The pipeline itself is left in half
    precision.
    """
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part)
    for name in TEXT_PARTS:
        file = part / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for file in (part / "model_index.json", *part.glob("tokenizer*/tokenizer_config.json")):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    files = [file for file in part.rglob("*") if file.is_file()]
    for file in files:
        final = target / file.relative_to(part)
        final.parent.mkdir(parents=True, exist_ok=True)
        file.replace(final)
    shutil.rmtree(part)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def export_checkpoint(folder: pathlib.Path, target: pathlib.Path) -> int:
    """Export the averaged weights of ``dit.pt`` in ``folder``; return the size in bytes."""
    state: Checkpoint | None = load_if_there(folder / "dit.pt")
    if state is None:
        raise FileNotFoundError(f"no dit.pt in {folder}; run train.py first")
    return export(assemble(folder, state["averages"]), target)
