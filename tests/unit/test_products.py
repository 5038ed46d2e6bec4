"""What a pipeline is said to make, by the outputs of its own module."""

from __future__ import annotations

import diffusers
import pytest

from steploom.worker.traits import products


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("StableDiffusionPipeline", ["images"]),
        ("WanPipeline", ["videos"]),
        ("StableAudioPipeline", ["audios"]),
        ("LLaDA2Pipeline", ["text"]),
        ("Kandinsky5T2IPipeline", ["images"]),
        ("MarigoldDepthPipeline", ["images"]),
        ("KandinskyV22PriorPipeline", []),  # embeddings
        ("StableCascadePriorPipeline", []),
    ],
)
def test_what_a_pipeline_makes_is_what_its_own_outputs_hold(name: str, made: list[str]) -> None:
    assert products.makes(object.__new__(getattr(diffusers, name))) == made
