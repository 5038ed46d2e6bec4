"""``cache=`` through the engine, over HTTP and on the command line: taken, refused, and told of."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client import CollectorRegistry
from serving import openai_client, video_client
from tiny_language import llada

from steploom import AsyncDiffusionEngine, DiffusionRequest, EngineObserver, InvalidRequest, StepEvent
from steploom.cli import arguments, generate, main
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.telemetry import EngineMetrics
from steploom.testing import FakeEngine

STEPS = 10
ALL = {"num_inference_steps": STEPS, "cache": "easycache:1000"}


def images(output: Any) -> np.ndarray:
    return np.asarray(output.images[0], np.int16)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_skipped_steps_are_told_by_events_timings_and_metrics(engine: Any) -> None:
    registry = CollectorRegistry()
    engine.observers.append(EngineMetrics(engine, registry))
    async with engine.stream("a cat", seed=1, latents_every=1, **ALL) as run:
        events = [event async for event in run if isinstance(event, StepEvent)]
        out = await run.result()
    engine.observers.pop()
    assert (events[-1].step, events[-1].skipped_steps) == (STEPS, STEPS - 3)
    assert all(one.step <= other.step and one.skipped_steps <= other.skipped_steps
               for one, other in itertools.pairwise(events))  # fmt: skip
    assert {event.batch_requests for event in events if event.skipped_steps > 0 and event.step < STEPS} <= {0}
    assert (out.timings.steps, out.timings.skipped_steps, out.timings.mean_batch_requests) == (STEPS, STEPS - 3, 1.0)
    assert registry.get_sample_value("steploom_skipped_steps_total") == STEPS - 3
    assert registry.get_sample_value("steploom_steps_total") == STEPS


@pytest.mark.asyncio(loop_scope="session")
async def test_off_and_a_threshold_of_0_change_nothing(engine: Any) -> None:
    plain, off, zero, skipping = [
        await engine.generate("a dog", seed=2, num_inference_steps=STEPS, cache=cache)
        for cache in (None, "off", {"name": "easycache", "threshold": 0}, {"name": "easycache", "threshold": 1000.0})
    ]
    assert np.array_equal(images(off), images(plain))
    assert np.array_equal(images(zero), images(plain))
    assert not np.array_equal(images(skipping), images(plain))
    assert (off.timings.skipped_steps, zero.timings.skipped_steps) == (0, 0)
    with pytest.raises(InvalidRequest, match="did you mean 'easycache'"):
        await engine.generate("a dog", cache="easy-cache")


async def test_a_language_model_refuses_with_the_mend() -> None:
    async with AsyncDiffusionEngine.from_pipeline(llada()) as engine:
        with pytest.raises(InvalidRequest, match=r"writes text.*leave it out") as caught:
            await engine.generate("hello", cache="easycache")
        assert caught.value.field == "cache"
        out = await engine.generate("hello", seed=1, cache="off", gen_length=8, block_length=8, num_inference_steps=2)
        assert out.timings.skipped_steps == 0


def test_a_pipeline_without_steps_refuses() -> None:
    from steploom import EngineConfig

    upscaler = PipelineInfo(pipeline_class="Upscaler", parameters=[Parameter("prompt")], makes=["images"])
    with pytest.raises(InvalidRequest, match="has no denoising steps to skip; leave it out"):
        check_arguments(DiffusionRequest("a", cache="easycache"), upscaler, EngineConfig())
    check_arguments(DiffusionRequest("a", cache="easycache:0"), upscaler, EngineConfig())


class Asked(EngineObserver):
    """What the engine was asked for."""

    def __init__(self) -> None:
        self.caches: list[Any] = []

    def on_queued(self, request: DiffusionRequest) -> None:
        self.caches.append(request.cache)


async def test_the_images_api_takes_it_and_names_the_field_that_it_refuses() -> None:
    asked = Asked()
    async with openai_client() as (client, engine):
        engine.observers.append(asked)
        for cache in ("easycache", "easycache:0.1", "off", None):
            await client.images.generate(prompt="a", extra_body={"cache": cache})
        for wrong in ("easy", "easycache:x", 0.1, {"name": "easycache"}, ""):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.images.generate(prompt="a", extra_body={"cache": wrong})
            assert caught.value.param == "cache"
    assert asked.caches == ["easycache", "easycache:0.1", "off", None]


@pytest.mark.filterwarnings("ignore:The Sora API")
async def test_the_videos_api_takes_it(tmp_path: pathlib.Path) -> None:
    asked = Asked()
    async with video_client(tmp_path) as (client, engine):
        engine.observers.append(asked)
        video = await client.videos.create_and_poll(
            prompt="a", poll_interval_ms=1, extra_body={"cache": "easycache:0.2"}
        )
        assert video.status == "completed"
    assert asked.caches == ["easycache:0.2"]


async def test_a_pretended_engine_takes_it_too() -> None:
    async with FakeEngine() as engine:
        assert (await engine.generate("a", cache="easycache")).timings.skipped_steps == 0


def test_the_command_takes_it_and_refuses_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    parser = arguments.Parser()
    generate.add_parser(parser.add_subparsers())
    options = parser.parse_args(["generate", "a cat", "--cache", "easycache:0.1"])
    assert generate._parameters(options)["cache"] == "easycache:0.1"
    assert "cache" not in generate._parameters(parser.parse_args(["generate", "a cat"]))
    for argv in (["--cache", "easy"], ["--set", "cache=easycache"], ["--engine", "cache=easy"]):
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(main.main(["generate", "a cat", *argv]))
        assert ended.value.code in (1, arguments.EXIT_USAGE)
    assert "did you mean 'easycache'?" in capsys.readouterr().err
