"""Measure how well the built-in model obeys prompts whose combinations it never saw in training.

``python benchmarks/demo_quality.py`` draws 200 held-out prompts with the stock diffusers pipeline, reads the pictures
with the pixel checker and prints how many have the right shapes, colours, sizes, background and relation.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from steploom import demo
from steploom.demo import checker, scene

NAMES = ("shape", "colour", "background", "content", "relation", "size", "everything")


def held_out_scenes(count: int, seed: int) -> list[scene.Scene]:
    """Return ``count`` different scenes whose first shape, colour and relation never occur together in training."""
    rng = np.random.default_rng(seed)
    scenes: dict[scene.Scene, None] = {}
    while len(scenes) < count:
        scenes[scene.random_scene(rng, held_out=True)] = None
    return list(scenes)


def draw(pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> NDArray[np.uint8]:
    """Return the pictures of prompts, 8-bit sRGB (n, side, side, 3); each has a seed of its own, its place."""
    parts: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), args.batch):
        some = prompts[start : start + args.batch]
        images = pipe(
            some,
            height=args.side,
            width=args.side,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=args.zero_tokens,
            generator=[torch.Generator().manual_seed(args.seed * 100_000 + start + k) for k in range(len(some))],
            output_type="np",
        ).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def sheet(pictures: NDArray[np.uint8], columns: int = 20) -> Image.Image:
    """Return pictures (n, side, side, 3) tiled into one, row by row."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures) - columns + 1, columns)]
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=demo.path())
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--zero-tokens", type=int, default=16, help="max_sequence_length of the pipeline")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--sheet", type=pathlib.Path, help="save all pictures, tiled, to this file")
    parser.add_argument("--failures", action="store_true", help="list the prompts that were not obeyed")
    return parser.parse_args()


def main() -> None:
    """Draw, check and report."""
    args = parse()
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts, args.seed)
    start = time.perf_counter()
    pictures = draw(pipe, [scene.prompt(one) for one in scenes], args)
    seconds = time.perf_counter() - start
    verdicts = [checker.check(picture, one) for picture, one in zip(pictures, scenes, strict=True)]
    shares = {name: sum(getattr(one, name) for one in verdicts) / len(verdicts) for name in NAMES}
    chosen = {"steps": args.steps, "guidance": args.guidance, "side": args.side, "zero_tokens": args.zero_tokens}
    print(json.dumps({"prompts": len(scenes), **chosen, "seconds": round(seconds, 1), **shares}))
    if args.failures:
        for place, (one, verdict) in enumerate(zip(scenes, verdicts, strict=True)):
            if not verdict.everything:
                wrong = [name for name in NAMES if name not in ("content", "everything") and not getattr(verdict, name)]
                print(f"{place:3d} {scene.prompt(one)}: {', '.join(wrong)}")
    if args.sheet is not None:
        sheet(pictures).save(args.sheet)


if __name__ == "__main__":
    main()
