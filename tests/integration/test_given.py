"""What ``from_pipeline`` is given and cannot be served is refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny

from steploom import AsyncDiffusionEngine, ConfigError, DiffusionEngine, EngineDead


@pytest.mark.parametrize("engine", [AsyncDiffusionEngine, DiffusionEngine])
@pytest.mark.parametrize("controlnet", [None, object()])
def test_none_is_no_pipeline(engine: Any, controlnet: Any) -> None:
    """Which would otherwise serve the built-in model."""
    with pytest.raises(ConfigError, match="from_pipeline: got None, which is no diffusers pipeline; give a Diff"):
        engine.from_pipeline(None, controlnet=controlnet)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (object, "builtins.object, which is no diffusers pipeline"),
        (lambda: "owner/name", "builtins.str, which is no diffusers pipeline"),
        (lambda: tiny.sd3().transformer, "SD3Transformer2DModel, which is no diffusers pipeline"),
        (lambda: diffusers.StableDiffusion3Pipeline, r"the class .*\.StableDiffusion3Pipeline, which is no diffusers"),
        (lambda: diffusers.StableDiffusionXLAutoBlocks(), "AutoBlocks, which belongs to a modular pipeline, and those"),
        (
            lambda: diffusers.StableDiffusionXLAutoBlocks().init_pipeline(),
            "XLModularPipeline, which belongs to a modular pipeline, and those are not served",
        ),
    ],
)
@pytest.mark.parametrize("controlnet", [None, object()])
async def test_what_is_no_pipeline_is_named(make: Any, words: str, controlnet: Any) -> None:
    engine = AsyncDiffusionEngine.from_pipeline(make(), controlnet=controlnet)
    with pytest.raises(ConfigError, match=f"^from_pipeline: got .*{words}.*; give a DiffusionPipeline$"):
        await engine.start()


class Faulty(diffusers.StableDiffusion3Pipeline):
    """Cannot say where it is."""

    @property
    def _execution_device(self) -> Any:
        raise KeyError("nowhere")


async def test_a_pipeline_that_fails_is_not_taken_for_the_built_in_model() -> None:
    engine = AsyncDiffusionEngine.from_pipeline(Faulty(**tiny.sd3().components))
    with pytest.raises(EngineDead, match=r"^the pipeline given .* not be served: KeyError") as said:
        await engine.start()
    assert "demo" not in str(said.value)
