"""Both executors with the real runner and the built-in model: the same image, the same words about a bad request."""

from __future__ import annotations

import numpy as np
import pytest

from steploom.config import EngineConfig
from steploom.errors import ConfigError, InvalidRequest
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.protocol import NewRequest, RunnerOutput, SchedulerOutput, WorkerStats
from steploom.requests import DiffusionRequest


class Extension:
    """Found by the worker through the engine's import path."""

    def steps(self) -> int:
        return self.runner.stats().ticks  # type: ignore[attr-defined]


async def draw(executor: DiffusionExecutor) -> RunnerOutput:
    """Ticks until the request is done; its last answer."""
    request = DiffusionRequest(
        "a red circle", seed=1, num_inference_steps=2, height=32, width=32, request_id="a", return_trajectory=True,
        latents_every=1, preview_every=2, guidance_scale=4.0,
    )  # fmt: skip
    answer = await executor.execute_step(SchedulerOutput(1, [NewRequest("a#0", request)]))
    while not answer.reports[0].finished:
        answer = await executor.execute_step(SchedulerOutput(answer.tick + 1, [], ["a#0"]))
    return answer


@pytest.mark.slow
async def test_a_process_and_a_thread_give_the_same_image() -> None:
    images = []
    for kind in (MultiprocExecutor, InprocExecutor):
        executor = kind(EngineConfig(torch_threads=1, worker_extension=f"{__name__}.Extension"))
        lines: list[str] = []
        try:
            info = await executor.start(lines.append)
            assert info.in_process == (kind is InprocExecutor)
            assert any("loading" in line for line in lines)
            (report,) = (await draw(executor)).reports
            assert report.error is None
            assert report.trajectory_latents.shape[0] == 2
            assert report.output["images"] is report.output.images
            images.append(np.asarray(report.output.images[0]))
            (stats,) = await executor.collective_rpc("stats")
            assert isinstance(stats, WorkerStats)
            assert stats.resident == 0
            assert await executor.collective_rpc("steps", unique_reply_rank=0) == stats.ticks
            with pytest.raises(InvalidRequest, match="this worker offers"):
                await executor.collective_rpc("nothing")
            await executor.sleep()
            await executor.wake_up()
        finally:
            await executor.shutdown()
    one, other = images
    assert one.shape == (32, 32, 3)
    assert np.array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiprocExecutor, InprocExecutor], ids=["mp", "inproc"])
async def test_a_model_that_does_not_exist(kind: type[DiffusionExecutor]) -> None:
    with pytest.raises(ConfigError, match="model='nowhere': must be 'demo', a folder"):
        await kind(EngineConfig(model="nowhere")).start()
