"""With ``batch_invariant`` a request's bits do not depend on who shares its forwards, nor on when who came and went."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request, tensor_of

from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner

MOST = 4
PROMPTS = ["a red cat", "two boats", "snow", "an old house"]


def some(luck: random.Random, name: str, extra: dict[str, Any]) -> DiffusionRequest:
    params = {"num_inference_steps": luck.randint(1, 5), "guidance_scale": luck.choice([1.0, 3.0, 7.5]), **extra}
    return request(name, luck.choice(PROMPTS), luck.randint(0, 9), height=32, width=luck.choice([32, 32, 48]), **params)


def meets(runner: Runner, luck: random.Random, watched: list[DiffusionRequest], extra: dict[str, Any]) -> Driver:
    """The watched requests among others that come and go as luck has it, never more than fit into a forward."""
    driver, waiting, others = Driver(runner), list(watched), 0
    luck.shuffle(waiting)
    while waiting or driver.running:
        join: list[DiffusionRequest] = []
        for _ in range(luck.randint(0, MOST - len(driver.running))):
            if waiting and luck.random() < 0.4:
                join.append(waiting.pop())
            elif waiting and luck.random() < 0.5:
                others += 1
                join.append(some(luck, f"other{others}", extra))
        driver.tick(join)
        gone = [run for run in driver.running if run.startswith("other") and luck.random() < 0.2]
        for run in gone:
            driver.cancel(run)
    return driver


@pytest.mark.parametrize(
    ("build", "rounds", "extra"),
    [
        (tiny.sd3, 4, {}),
        (tiny.sdxl, 4, {}),
        (tiny.flux, 4, {}),
        (tiny.qwen_image, 4, {"true_cfg_scale": 2.0}),
        pytest.param(tiny.sd3, 100, {}, marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
    ids=["sd3", "sdxl", "flux", "qwen", "sd3 a hundred times"],
)
def test_bits_do_not_depend_on_company(build: Callable[[], Any], rounds: int, extra: dict[str, Any]) -> None:
    pipe, luck = build(), random.Random(build.__name__)
    watched = [some(luck, f"watched{i}", extra) for i in range(6)]
    expected: dict[str, Any] = {}
    for one in watched:
        lonely = Driver(Runner.from_pipeline(build(), config(batch_invariant=True, max_batch=MOST)))
        expected[one.request_id] = lonely.drain([one])[one.request_id].output
        assert distance(expected[one.request_id], alone(pipe, one)) < 1e-4, (
            "it is the image of the pipeline all the same"
        )
    runner = Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=MOST))
    shared = 0.0
    for _ in range(rounds):
        driver = meets(runner, luck, watched, extra)
        for name, image in expected.items():
            report = driver.finished[name]
            assert report.error is None, report.error and report.error.traceback
            assert torch.equal(tensor_of(report.output), tensor_of(image)), name
            shared = max(shared, *driver.sharing(name))
    assert shared > 1, "forwards are shared"
    runner.close()
