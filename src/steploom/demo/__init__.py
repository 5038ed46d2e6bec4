"""The built-in model: a tiny text-to-image pipeline that draws coloured shapes.

The folder is a stock diffusers pipeline folder. Nothing here imports torch or diffusers.
"""

from __future__ import annotations

import pathlib

__all__ = ["EXAMPLE_PROMPT", "path"]

EXAMPLE_PROMPT = "a large red circle above a small blue square on a white background"
"""A prompt that the built-in model can draw."""


def path() -> pathlib.Path:
    """Return the folder of the built-in model, in the layout of ``DiffusionPipeline.from_pretrained``."""
    return pathlib.Path(__file__).resolve().parent / "model"
