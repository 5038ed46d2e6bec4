"""Memory on CUDA: the peak of ticks is measured, grows with their rows, and bounds who is resident."""

from __future__ import annotations

import asyncio
from typing import Any

import tiny
import torch
from driving import Driver, alone, config, distance, request

from steploom import AsyncDiffusionEngine
from steploom.engine.observer import EngineObserver
from steploom.worker.runner import Runner

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 8, "max_sequence_length": 16}


def asked(count: int) -> list[Any]:
    return [request(f"r{n}", f"a cat {n}", n, **SIZE) for n in range(count)]


def steady_peak(driver: Driver, requests: list[Any]) -> int:
    """Bytes at the peak of a tick in which all of them denoise, and nobody joins or leaves; after warm-up."""
    driver.drain(requests)
    driver.tick([request(f"{one.request_id}again", one.prompt, one.seed, **SIZE) for one in requests])
    peaks = [driver.tick().peak_bytes for _ in range(3)]
    driver.drain()
    return min(peaks)


def test_a_tick_tells_its_peak_and_what_there_is(cuda):
    driver = Driver(Runner.from_pipeline(tiny.sd3().to(cuda), config()))
    assert 0 < driver.runner.info.room_bytes <= torch.cuda.mem_get_info()[1]
    one, eight = steady_peak(driver, asked(1)), steady_peak(driver, asked(8))
    assert one > 0
    assert 2 * one < eight < 16 * one, "it grows with the rows"


class Residents(EngineObserver):
    """The most requests that were resident in a tick."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self.most = 0

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        self._held |= set(output.run_ids)
        self.most = max(self.most, len(self._held))
        self._held -= {report.run_id for report in result.reports if report.finished}


async def served(pipe: Any, requests: list[Any], share: float | None) -> tuple[list[Any], int, float]:
    """What these give after one of their kind, the most that were resident, and the share of the memory of one."""
    seen = Residents()
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=8, memory_share=share) as engine:
        await engine.generate("a dog", seed=9, output_type="latent", **SIZE)
        await engine.generate("a dog", seed=9, output_type="latent", **SIZE)
        (cost,) = engine.costs()
        engine.observers.append(seen)
        found = await asyncio.gather(
            *(engine.generate(one.prompt, seed=one.seed, output_type="latent", **one.params) for one in requests)
        )
        room = engine._serving().scheduler.costs.room_bytes
    return found, seen.most, 2 * (cost.held_bytes + cost.peak_bytes) / max(1, room)


async def test_residents_are_bounded_by_what_they_keep_and_the_peak_of_their_ticks(cuda):
    pipe = tiny.sd3().to(cuda)
    requests = asked(8)
    expected = [alone(pipe, one) for one in requests]
    _, most, of_one = await served(pipe, requests, 0.9)
    assert most == 8, "the device has room"
    found, most, _ = await served(pipe, requests, 3.5 * of_one)
    assert 1 < most < 8
    for result, wanted in zip(found, expected, strict=True):
        assert distance(result.output[0].cpu(), wanted[0].cpu()) <= 1e-4
