"""vLLM-Omni in step mode: ``AsyncOmni(step_execution=True, max_num_seqs=N)``, as its documentation has it.

Its user guide, "Step Execution" and "Diffusion Execution Modes": requests with other sampling parameters stay in other
batches, and pipelines without the stepwise contract are refused at the start. Runs in the environment that vLLM-Omni
was installed into; nothing of ours is imported there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any


class Driver:
    """Of vLLM-Omni."""

    async def start(self, checkpoint: str, settings: dict[str, Any]) -> dict[str, str]:
        """Loads the checkpoint in step mode."""
        from vllm_omni.entrypoints.async_omni import AsyncOmni

        self._engine = AsyncOmni(
            model=checkpoint,
            dtype=settings.get("dtype", "bfloat16"),
            step_execution=True,
            max_num_seqs=settings["max_batch"],
            enforce_eager=not settings.get("compile"),
        )
        names = ("vllm", "vllm-omni", "torch")
        there = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
        return {name: there.get(name, "unknown") for name in names}

    async def generate(self, item: dict[str, Any]) -> Any:
        """Latents of one request as a float32 array, or None where it gives none.

        Raises:
            ValueError: Its sampling parameters lack an argument.
            RuntimeError: It failed, or ended without an output.
        """
        last = None
        prompt = {"prompt": item["prompt"]}
        if item["negative_prompt"] is not None:
            prompt["negative_prompt"] = item["negative_prompt"]
        sampling = [self._sampling(item)]
        async for output in self._engine.generate(prompt, request_id=item["id"], sampling_params_list=sampling):
            last = output
        if last is None:
            raise RuntimeError("it ended without an output")
        if getattr(last, "error", None):
            raise RuntimeError(str(last.error))
        return _latents(last)

    def _sampling(self, item: dict[str, Any]) -> Any:
        import torch
        from vllm_omni.inputs.data import OmniDiffusionSamplingParams

        wanted = {
            "num_inference_steps": item["steps"], "height": item["height"], "width": item["width"],
            "seed": item["seed"], "output_type": "latent", **item["arguments"],
            "generator": torch.Generator("cpu").manual_seed(item["seed"]),
        }  # fmt: skip
        known = {field.name for field in dataclasses.fields(OmniDiffusionSamplingParams)}
        missing = sorted(wanted.keys() - known - {"generator", "output_type"})
        if missing:
            raise ValueError(f"OmniDiffusionSamplingParams has no {', '.join(missing)}")
        return OmniDiffusionSamplingParams(**{name: value for name, value in wanted.items() if name in known})

    async def stop(self) -> None:
        """Ends its processes."""
        self._engine.shutdown()


def _latents(output: Any) -> Any:
    """Where versions of it have put them: ``latents``, or in place of the images."""
    places = (getattr(output, "latents", None), *(getattr(output, "images", None) or ()))
    found = next((place for place in places if hasattr(place, "float") and hasattr(place, "cpu")), None)
    return None if found is None else found.float().cpu().numpy()
