"""Tests of this folder run on each device that is there: tiny on the CPU everywhere, and on CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where the models are."""
    return request.param


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> str:
    """For what cannot be seen on a CPU, or is tested there elsewhere."""
    return request.param


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32, also on devices that would take fewer bits."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, was in zip(places, before, strict=True):
        place.allow_tf32 = was
