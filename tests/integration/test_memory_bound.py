"""Measured bytes: what a request keeps is what its tensors weigh, and residents are bounded by it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request

from steploom import AsyncDiffusionEngine
from steploom.engine.observer import EngineObserver
from steploom.worker import gauges
from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 16}


def weight(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sd3_bytes(pipe: Any, images: int = 1, pixels: int = 32) -> int:
    """Latents of both branches, text, pooled text, and one time a row."""
    side, rows = pixels // pipe.vae_scale_factor, 2 * images
    text = pipe.encode_prompt("a", "a", "a", num_images_per_prompt=images, max_sequence_length=16)
    return weight(*text) + rows * (pipe.transformer.config.in_channels * side * side + 1) * 4


def told(driver: Driver, run: str) -> list[int]:
    return [report.held_bytes for report in driver.reports[run]]


def test_what_is_told_is_what_latents_and_embeddings_weigh_and_it_is_told_once():
    pipe = tiny.sd3()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain([
        request("one", "a cat", 1, **SMALL),
        request("three", "a cat", 2, num_images_per_prompt=3, **SMALL),
        request("large", "a cat", 3, **{**SMALL, "height": 64, "width": 64}),
    ])  # fmt: skip
    expected = {"one": sd3_bytes(pipe), "three": sd3_bytes(pipe, 3), "large": sd3_bytes(pipe, 1, 64)}
    for run, held in expected.items():
        assert [value for value in told(driver, run) if value] == [held]
    assert expected["three"] == 3 * expected["one"] < 3 * expected["large"]


def test_both_calls_of_a_step_count_and_what_they_have_in_common_counts_once():
    pipe = tiny.qwen_image()
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    own = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    one = request("one", "a cat", 1, negative_prompt="a dog, perhaps", true_cfg_scale=4.0, **own)
    alone(pipe, one)
    first, second = seen[:2]
    assert first["hidden_states"] is second["hidden_states"]
    names = ("encoder_hidden_states", "encoder_hidden_states_mask")
    expected = weight(*(call[name] for call in (first, second) for name in names if call[name] is not None))
    expected += weight(first["hidden_states"])
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain([one])
    (held,) = [value for value in told(driver, "one") if value]
    assert expected <= held <= expected + 16, "and the time"


class Residents(EngineObserver):
    """How many requests were resident in each tick."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self.counts: list[int] = []

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        self._held |= set(output.run_ids)
        self.counts.append(len(self._held))
        self._held -= {report.run_id for report in result.reports if report.finished}


async def generate_all(engine: AsyncDiffusionEngine, asked: list[Any]) -> list[Any]:
    found: list[Any] = [None] * len(asked)

    async def run(place: int, one: Any) -> None:
        own = {"request_id": one.request_id, "seed": one.seed, "output_type": one.output_type, **one.params}
        found[place] = await engine.generate(one.prompt, **own)

    async with anyio.create_task_group() as group:
        for place, one in enumerate(asked):
            group.start_soon(run, place, one)
    return found


async def check(pipe: Any, asked: list[Any], most: int, **settings: Any) -> list[Any]:
    """Serves these after one of their kind: all equal alone, and ``most`` of them resident at once. The costs."""
    expected = [alone(pipe, one) for one in asked]
    observer = Residents()
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=8, **settings) as engine:
        await generate_all(engine, [request("warm", "a dog", 9, **SMALL)])
        engine.observers.append(observer)
        found = await generate_all(engine, asked)
        costs = engine.costs()
    assert max(observer.counts) == most
    for result, wanted in zip(found, expected, strict=True):
        assert distance(result.output, wanted) <= 1e-4
    return costs


@pytest.mark.parametrize("policy", ["deadline", "fcfs"])
async def test_only_so_many_are_resident_as_there_is_memory_for(policy: str, monkeypatch: pytest.MonkeyPatch):
    pipe = tiny.sd3()
    held = sd3_bytes(pipe)
    monkeypatch.setattr(gauges, "EVERY", 10**9)  # The pretended figure does not change with what is held.
    monkeypatch.setattr(gauges, "available_bytes", lambda: int(2.4 * held))  # Beside the first one, which holds 1.
    asked = [request(f"r{n}", f"a cat {n}", n, **{**SMALL, "num_inference_steps": 4 + n % 3}) for n in range(8)]
    (cost,) = await check(pipe, asked, 3, policy=policy)
    assert (2 * cost.held_bytes, cost.peak_bytes) == (held, 0)


async def test_all_are_resident_if_there_is_memory(monkeypatch: pytest.MonkeyPatch):
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, **SMALL) for n in range(8)]
    monkeypatch.setattr(gauges, "available_bytes", lambda: 1)
    await check(pipe, asked, 8, memory_share=None)
    monkeypatch.undo()
    await check(pipe, asked, 8)


class PretendedCuda:
    """Counts as ``torch.cuda`` does: the denoiser takes a million bytes a row, and gives them back."""

    def __init__(self, module: torch.nn.Module, free: int) -> None:
        self._free, self._peak = free, 0
        module.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, module: Any, args: Any, kwargs: Any) -> None:
        self._peak = max(self._peak, 10**6 * len(kwargs["hidden_states"]))

    def mem_get_info(self, device: torch.device, /) -> tuple[int, int]:
        return self._free, 10**9

    def memory_allocated(self, device: torch.device, /) -> int:
        return 5_000

    def memory_reserved(self, device: torch.device, /) -> int:
        return 6_000

    def max_memory_allocated(self, device: torch.device, /) -> int:
        return 5_000 + self._peak

    def reset_peak_memory_stats(self, device: torch.device, /) -> None:
        self._peak = 0


async def test_the_peak_of_the_forwards_counts_where_the_device_says_it(monkeypatch: pytest.MonkeyPatch):
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, **{**SMALL, "num_inference_steps": 4 + n % 3}) for n in range(8)]
    cuda = PretendedCuda(pipe.transformer, 10**7)
    monkeypatch.setattr("steploom.worker.runner.gauge_of", lambda device, _: gauges.CudaGauge(device, cuda))
    (cost,) = await check(pipe, asked, 4, memory_share=0.95)  # Of two rows each.
    assert cost.peak_bytes == 10**6
