"""steploom over a worker process, as its users have it."""

from __future__ import annotations

import importlib.metadata
from typing import Any


class Driver:
    """Of this project."""

    async def start(self, checkpoint: str, settings: dict[str, Any]) -> dict[str, str]:
        """Loads the checkpoint."""
        import steploom

        names = ("dtype", "device", "max_batch", "torch_threads", "compile", "attention_backend")
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        self._engine = steploom.AsyncDiffusionEngine(model=checkpoint, max_waiting=100_000, **given)
        await self._engine.start()
        return {"steploom": steploom.__version__, "torch": importlib.metadata.version("torch")}

    async def generate(self, item: dict[str, Any]) -> Any:
        """Latents of one request ``[rows, ...]``, as a float32 array."""
        negative = {} if item["negative_prompt"] is None else {"negative_prompt": item["negative_prompt"]}
        out = await self._engine.generate(
            item["prompt"], seed=item["seed"], num_inference_steps=item["steps"], width=item["width"],
            height=item["height"], output_type="latent", **negative, **item["arguments"],
        )  # fmt: skip
        return out.output[0].float().cpu().numpy()

    async def stop(self) -> None:
        """Ends the worker."""
        await self._engine.close()
