"""Attention backends are diffusers' own, by their names; what does not compute here is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import shallow
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from driving import Driver, alone, distance, request

from steploom import ConfigError, EngineConfig
from steploom.worker.runner import Runner


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """diffusers keeps the last choice for the whole process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def refusal(backend: str, model: str = "shallow:flux") -> str:
    with pytest.raises(ConfigError) as caught:
        Runner.load(EngineConfig(model=model, device="cpu", attention_backend=backend))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "_native_math", "_NATIVE_FLASH"])
def test_outputs_are_those_of_the_pipeline_with_the_same_backend(backend: str) -> None:
    runner = Runner.load(EngineConfig(model="shallow:flux", device="cpu", attention_backend=backend))
    pipe: Any = shallow.flux()
    pipe.transformer.set_attention_backend(backend)
    requests = [request(n, p, i, num_inference_steps=2, height=32, width=32)
                for i, (n, p) in enumerate((("a", "a cat"), ("b", "blue dogs")))]  # fmt: skip
    finished = Driver(runner).drain(requests)
    for one in requests:
        assert distance(finished[one.request_id].output, alone(pipe, one)) <= 1e-4


def test_an_unknown_name_is_told_the_nearest() -> None:
    assert refusal("flahs").startswith("attention_backend='flahs': diffusers has no such backend; did you mean 'flash'")
    assert "it has flash, " in refusal("zzz")


@pytest.mark.parametrize("backend", ["flash", "sage", "xformers"])
def test_a_missing_package_is_named(backend: str) -> None:
    message = refusal(backend)
    assert message.startswith(f"attention_backend='{backend}': ")
    assert "install" in message
    assert message.endswith("; leave it None for the model's own")


def test_what_does_not_compute_here_is_refused_at_the_start() -> None:
    assert "does not compute on cpu in float32 (" in refusal("_native_cudnn")


def test_processors_without_a_choice_are_told() -> None:
    lines: list[str] = []
    Runner.load(EngineConfig(model="shallow:sd3", device="cpu", attention_backend="_native_math"), lines.append)
    words = "attention_backend='_native_math' is without effect on JointAttnProcessor2_0 of transformer"
    assert any(line.startswith(words) for line in lines)
