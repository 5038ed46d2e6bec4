"""A pipeline that steps nothing but copies of its noise scheduler, one for each latent frame, has steps, too."""

from __future__ import annotations

import asyncio
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance import parts_video
from conformance.case import CASES
from diffusers import SkyReelsV2DiffusionForcingPipeline

from steploom import AsyncDiffusionEngine, InvalidRequest, StepEvent

parts_video.without_ftfy("skyreels_v2.pipeline_skyreels_v2_diffusion_forcing")


def _forcing() -> Any:
    pipe = SkyReelsV2DiffusionForcingPipeline(**CASES["SkyReelsV2Pipeline"].build().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _asked(i: int, steps: int, **more: Any) -> dict[str, Any]:
    asked = {**CASES["SkyReelsV2Pipeline"].inputs(i), "num_frames": 9, "num_inference_steps": steps}
    return {**asked, "output_type": "latent", **more}


async def test_the_turns_of_its_loop_are_its_steps() -> None:
    pipe = _forcing()
    alone = [pipe(**_asked(i, 3 + i, ar_step=i), generator=torch.Generator().manual_seed(i)).frames for i in range(2)]
    totals = [3, 6]  # the second frame begins a step after the first, and so on

    async def one(engine: AsyncDiffusionEngine, i: int) -> tuple[Any, list[StepEvent]]:
        wanted: dict[str, Any] = {"preview_every": 1, "return_trajectory": True, "seed": i}
        async with engine.stream(**_asked(i, 3 + i, ar_step=i), **wanted) as run:
            events = [event async for event in run if isinstance(event, StepEvent)]
            return await run.result(), events

    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        for i, (output, events) in enumerate(await asyncio.gather(*(one(engine, i) for i in range(2)))):
            assert torch.allclose(output.output.frames, alone[i], atol=1e-4)
            told = [(event.step, event.total_steps) for event in events]
            steps = [(step, totals[i]) for step in range(1, totals[i] + 1)]
            assert set(told) <= set(steps)  # who reads slowly misses some
            assert told[-1] == steps[-1]
            assert output.timings.steps == totals[i]
            assert all(event.preview is None for event in events)
            assert torch.equal(output.trajectory_latents[-1], output.output.frames)
            assert len(output.trajectory_latents) == totals[i]


async def test_they_are_skipped_and_bounded_like_others() -> None:
    async with AsyncDiffusionEngine.from_pipeline(_forcing(), max_steps=10) as engine:
        output = await engine.generate(**_asked(0, 10), seed=1, cache="easycache:9")
        assert output.timings.skipped_steps > 0
        with pytest.raises(InvalidRequest, match=r"ar_step=5: .* takes 20 steps of it, at most 10 .*max_steps"):
            await engine.generate(**_asked(0, 10, ar_step=5), seed=1)


async def test_the_steps_of_all_windows_of_a_video_are_bounded_together() -> None:
    long = {"num_frames": 29, "base_num_frames": 17, "overlap_history": 5}
    async with AsyncDiffusionEngine.from_pipeline(_forcing(), max_steps=7) as engine:
        with pytest.raises(InvalidRequest, match="num_inference_steps=4: 8 steps in 2 windows of the video, at most 7"):
            await engine.generate(**_asked(0, 4, **long), seed=1)
        with pytest.raises(InvalidRequest, match=r"ar_step=1: .* takes 10 steps of it, at most 7"):
            await engine.generate(**_asked(0, 3, **long, ar_step=1), seed=1)
        output = await engine.generate(**_asked(0, 3, **long), seed=1)
        assert output.timings.steps == 6


@pytest.mark.parametrize("name", ["HeliosPipeline", "HunyuanVideoFramepackPipeline"])
async def test_the_steps_of_windows_that_look_back_are_bounded_together(name: str) -> None:
    case = CASES[name]
    asked = {**case.inputs(0), "num_frames": 18, "output_type": "latent", "seed": 1}
    async with AsyncDiffusionEngine.from_pipeline(case.build(), max_steps=5) as engine:
        with pytest.raises(InvalidRequest, match="num_inference_steps=3: 6 steps in 2 windows of the video, at most 5"):
            await engine.generate(**asked, num_inference_steps=3)
        output = await engine.generate(**asked, num_inference_steps=2)
        assert output.timings.steps == 4


@pytest.mark.slow
async def test_the_steps_of_loops_that_no_argument_tells_are_bounded_together() -> None:
    case = CASES["AnimateDiffPipeline"]
    pipe = case.build()
    pipe.enable_free_init(num_iters=3)
    asked = {**case.inputs(0), "output_type": "latent", "seed": 1}
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_steps=7) as engine:
        with pytest.raises(InvalidRequest, match="AnimateDiffPipeline takes 9 steps of it, at most 7"):
            await engine.generate(**asked, num_inference_steps=3)
        output = await engine.generate(**asked, num_inference_steps=2)
        assert output.timings.steps == 6


@pytest.mark.slow
async def test_what_steps_itself_has_no_steps_of_its_copies() -> None:
    """LTX2 steps a copy for the sound in each turn."""
    case = CASES["LTX2Pipeline"]
    async with AsyncDiffusionEngine.from_pipeline(case.build()) as engine:
        output = await engine.generate(**case.inputs(0), num_inference_steps=2, output_type="latent", seed=1)
        assert output.timings.steps == 2
