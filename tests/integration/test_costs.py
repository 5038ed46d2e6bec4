"""What an engine learns about its ticks, and that the next engine knows it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from steploom import AsyncDiffusionEngine
from steploom.errors import ConfigError, EngineNotRunning

SMALL = {"width": 32, "height": 32, "num_inference_steps": 8, "max_sequence_length": 16}


@pytest.mark.asyncio
async def test_a_profiling_pass_measures_before_anybody_asks(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_model), "distributed_executor_backend": "inproc", "torch_threads": 1, "max_batch": 4,
                "costs_file": str(tmp_path / "costs.json"), "profile": "32x32"}  # fmt: skip
    told: list[str] = []
    engine = await AsyncDiffusionEngine(**settings).start(told.append)
    (cost,) = engine.costs()
    await engine.close()
    assert {2, 4} <= cost.seconds.keys()
    assert "profiling 32x32, 2 at a time" in told
    told.clear()
    engine = await AsyncDiffusionEngine(**settings).start(told.append)
    assert not any("profiling" in line for line in told), "costs are known"
    await engine.close()


@pytest.mark.asyncio
async def test_a_size_that_the_model_refuses_ends_the_start_with_the_reason(tiny_model: Path) -> None:
    engine = AsyncDiffusionEngine(model=str(tiny_model), distributed_executor_backend="inproc", profile="33x33")
    with pytest.raises(ConfigError, match=r"profile='33x33': a request of 33x33 failed.*33"):
        await engine.start()
    with pytest.raises(EngineNotRunning):
        engine.costs()


@pytest.mark.asyncio
async def test_an_engine_tells_what_ticks_cost_and_the_next_one_knows(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_model), "distributed_executor_backend": "inproc", "torch_threads": 1,
                "costs_file": str(tmp_path / "costs.json"), "max_batch": "auto"}  # fmt: skip
    async with AsyncDiffusionEngine(**settings) as engine:
        assert engine.costs() == []
        for count in (1, 3, 3):  # The first merge of a kind is warm-up, and does not count.
            await asyncio.gather(*(engine.generate(f"a {n}", seed=n, **SMALL) for n in range(count)))
        (cost,) = engine.costs()
    assert {2, 6} <= cost.seconds.keys()
    assert 0 < cost.seconds[2] <= cost.seconds[6] < 60
    assert all(cost.samples.values())
    assert cost.batch_key.startswith("transformer")
    async with AsyncDiffusionEngine(**settings) as engine:
        (known,) = engine.costs()
    assert known.seconds == cost.seconds
