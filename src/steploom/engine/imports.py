"""Imports that answers from a worker process need, made off the event loop before the first of them arrives.

Decoding an image imports Pillow, decoding a tensor imports torch, which takes seconds: not something to happen inside
an event loop that serves people. Nothing here is imported for a pipeline in this process, which has it all.
"""

from __future__ import annotations

import importlib
import sys

from anyio import to_thread

from steploom.requests import DiffusionRequest

_TENSORS = ("pt", "latent")
"""Values of ``output_type`` that mean tensors."""


async def prepare_for_images() -> None:
    """Imports what decoding images and arrays needs, in a thread."""
    for name in ("numpy", "PIL.Image"):
        await _load(name)


async def prepare_for(request: DiffusionRequest) -> None:
    """Imports torch, in a thread, if ``request`` asks for tensors."""
    if request.latents_every or request.return_trajectory or request.output_type in _TENSORS:
        await _load("torch")


async def _load(name: str) -> None:
    if name not in sys.modules:
        await to_thread.run_sync(importlib.import_module, name, abandon_on_cancel=True)
