"""``pipe(...)`` behind a lock, in a thread: what an application without an engine does."""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import Any


class Driver:
    """Of diffusers alone."""

    async def start(self, checkpoint: str, settings: dict[str, Any]) -> dict[str, str]:
        """Loads the checkpoint."""
        import torch
        from diffusers import DiffusionPipeline

        if settings.get("torch_threads"):
            torch.set_num_threads(settings["torch_threads"])
        self._lock = asyncio.Lock()  # noqa: TID251 - the very thing that is compared with
        dtype = getattr(torch, settings.get("dtype", "float32"))
        self._pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype).to(settings.get("device", "cpu"))
        self._pipe.set_progress_bar_config(disable=True)
        found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
        return {**found, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}

    async def generate(self, item: dict[str, Any]) -> Any:
        """Latents of one request ``[rows, ...]``, as a float32 array."""
        async with self._lock:
            return await asyncio.to_thread(self._call, item)

    def _call(self, item: dict[str, Any]) -> Any:
        import torch

        negative = {} if item["negative_prompt"] is None else {"negative_prompt": item["negative_prompt"]}
        with torch.no_grad():
            latents = self._pipe(
                prompt=item["prompt"], num_inference_steps=item["steps"], width=item["width"], height=item["height"],
                generator=torch.Generator("cpu").manual_seed(item["seed"]), output_type="latent", return_dict=False,
                **negative, **item["arguments"],
            )[0]  # fmt: skip
        return latents.float().cpu().numpy()

    async def stop(self) -> None:
        """Nothing runs that would have to be ended."""
