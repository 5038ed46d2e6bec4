"""A pipeline without its decoder makes latents, and says so before any work."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
from driving import alone, distance, request

from steploom import AsyncDiffusionEngine, EngineConfig, InvalidRequest
from steploom.worker.models import left_out


async def test_without_a_vae_all_but_latents_is_refused_before_any_work(tiny_model: Path) -> None:
    left: dict[str, Any] = {"device": "cpu", "distributed_executor_backend": "inproc", "components": {"vae": None}}
    small = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    whole = await asyncio.to_thread(alone, checkpoints.load(tiny_model, vae=None), request("a", "a cat", **small))
    async with AsyncDiffusionEngine(EngineConfig(model=str(tiny_model), **left)) as engine:
        for wanted in ("pil", "np"):
            with pytest.raises(InvalidRequest, match=f"output_type='{wanted}': this StableDiff.* without its vae, .*; "
                               "give output_type='latent'") as caught:  # fmt: skip
                await engine.generate("a cat", output_type=wanted, **small)
            assert caught.value.field == "output_type"
        (stats,) = await engine.collective_rpc("stats")
        assert stats.ticks == 0
        assert distance((await engine.generate("a cat", output_type="latent", **small)).output, whole) <= 1e-4


def test_a_decoder_that_a_pipeline_can_do_without_does_not_bind_it_to_latents() -> None:
    pipe = tiny.sd3()
    kinds = ["latent", "pil"]
    assert left_out.decoder(pipe, kinds) == ""
    pipe.vae = None
    assert left_out.decoder(pipe, kinds) == "vae"
    assert left_out.decoder(pipe, ["np", "pt"]) == "", "which makes no latents either"
    type(pipe)._optional_components.append("vae")
    try:
        assert left_out.decoder(pipe, kinds) == ""
    finally:
        type(pipe)._optional_components.remove("vae")
    assert left_out.decoder(object(), kinds) == ""
