"""Arrays where numbers or texts belong: refused by name, before anything compares, counts or converts them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from steploom import AsyncDiffusionEngine, InvalidRequest

NUMBERS = "must be a list of finite numbers, at least one"


async def test_arrays_of_the_wrong_kind_are_refused_by_name() -> None:
    odd: list[tuple[str, Any, str]] = [
        ("prompt", np.array(["a"]), "must be a str, or a list of str"),
        ("seed", torch.zeros(0), "must be an integer, or None to draw one"),
        ("seed", np.zeros((2, 2)), "must be an integer, or None to draw one"),
        ("timesteps", torch.tensor(float("nan")), NUMBERS),
        ("sigmas", torch.tensor(1.0), NUMBERS),
        ("sigmas", np.zeros((2, 2)), NUMBERS),
    ]
    async with AsyncDiffusionEngine.from_pipeline(tiny.sdxl()) as engine:
        for field, value, said in odd:
            with pytest.raises(InvalidRequest, match=said) as caught:
                await engine.generate(**{"prompt": "a cat", "num_inference_steps": 2, field: value})
            assert caught.value.field == field


async def test_arrays_in_place_of_a_size_are_told_alone() -> None:
    """``original_size or (height, width)`` asks an array for its truth; neither height nor width is at fault."""
    given = {"num_inference_steps": 2, "height": 32, "width": 32}
    async with AsyncDiffusionEngine.from_pipeline(tiny.sdxl()) as engine:
        for field, value in (("original_size", torch.tensor([32, 32])), ("target_size", np.zeros(2))):
            with pytest.raises(InvalidRequest, match=rf"^{field}=<\w+ \[2\] \w+>: ") as caught:
                await engine.generate("a cat", **given, **{field: value})
            assert caught.value.field == field
