"""A language model's stream whose program is lost: what was committed is right, and a replay gives the whole text."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import tiny_language

from steploom import AsyncDiffusionEngine, Commit, DiffusionRequest, Restarted
from steploom.worker.trials.trial import run_alone

PARAMS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "num_inference_steps": 4, "temperature": 1.0,
                          "threshold": 0.3}  # fmt: skip
PROMPT, SEED = "why is the sky blue", 5


class Losing:
    """Methods of the worker: it loses what it runs, or says which process it is."""

    runner: Any

    def lose(self) -> None:
        for run_id in list(self.runner._residents):
            self.runner._forget(run_id)

    def process(self) -> int:
        return os.getpid()


def alone() -> str:
    pipe = tiny_language.llada()
    pipe.set_progress_bar_config(disable=True)
    return run_alone(pipe, DiffusionRequest(PROMPT, seed=SEED, **PARAMS)).texts[0]


@pytest.mark.parametrize("backend", ["inproc", pytest.param("mp", marks=pytest.mark.slow)])
async def test_a_replayed_stream_commits_the_whole_text_anew(backend: str) -> None:
    config: dict[str, Any] = {
        "model": "tiny_language:llada", "worker_extension": f"{__name__}.Losing",
        "distributed_executor_backend": backend,
    }  # fmt: skip
    told = [""]
    async with (
        AsyncDiffusionEngine(**config) as engine,
        engine.stream(PROMPT, seed=SEED, **PARAMS) as run,
    ):
        async for event in run:
            if isinstance(event, Restarted):
                told.append("")
            if isinstance(event, Commit):
                assert isinstance(event.text, str)
                told[-1] += event.text
                if len(told) == 1:
                    await engine.collective_rpc("lose")
        text = (await run.result()).text
    assert len(told) >= 2, "it was replayed"
    assert told[-1] == text == alone()
    assert all(text.startswith(lost) for lost in told)


@pytest.mark.slow
async def test_the_stream_of_a_text_whose_worker_is_killed_commits_the_whole_text_anew() -> None:
    config: dict[str, Any] = {"model": "tiny_language:llada", "worker_extension": f"{__name__}.Losing"}
    told = [""]
    async with AsyncDiffusionEngine(**config) as engine:
        [process] = await engine.collective_rpc("process")
        async with engine.stream(PROMPT, seed=SEED, **PARAMS) as run:
            async for event in run:
                if isinstance(event, Restarted):
                    told.append("")
                if isinstance(event, Commit):
                    assert isinstance(event.text, str)
                    told[-1] += event.text
                    if len(told) == 1:
                        os.kill(process, signal.SIGKILL)
            text = (await run.result()).text
    assert len(told) == 2
    assert told[0]
    assert told[1] == text == alone()
    assert text.startswith(told[0])
