"""The blocking engine end to end: real worker processes, real threads that wait."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from steploom import (
    DiffusionEngine,
    DiffusionRequest,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    RequestCancelled,
)

pytestmark = pytest.mark.timeout(120)


class Extension:
    """What tests do to a worker, in the worker."""

    def pid(self) -> int:
        return os.getpid()

    def block(self, path: str) -> str:
        """Tells that it is there, and blocks until the test has written."""
        with open(path + ".there", "w"):  # noqa: PTH123
            pass
        with open(path) as pipe:  # noqa: PTH123
            return pipe.read()

    def boom(self) -> None:
        raise ZeroDivisionError("as asked")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[DiffusionEngine]:
    with make(tiny_model) as engine:
        yield engine


def make(model: Path, **config: Any) -> DiffusionEngine:
    return DiffusionEngine(model=str(model), torch_threads=1, worker_extension=f"{__name__}.Extension", **config)


def request(steps: int = 4, **params: Any) -> DiffusionRequest:
    return DiffusionRequest("a cat", seed=1, num_inference_steps=steps, output_type="latent", **params)


def busy(engine: DiffusionEngine, pool: ThreadPoolExecutor, folder: Path) -> tuple[Any, Path]:
    """The worker is in a call that lasts until somebody writes into the path; what waits for it, and the path."""
    pipe, there = folder / "pipe", folder / "pipe.there"
    os.mkfifo(pipe)
    os.mkfifo(there)
    waiting = pool.submit(engine.collective_rpc, "block", None, (str(pipe),), None, 0)
    there.read_text()
    return waiting, pipe


def test_step_runs_whole_requests_and_each_has_its_own_outcome(engine: DiffusionEngine) -> None:
    outs = engine.step([request(3), request(3, no_such=1), request(6), request(3)])
    assert [out.error is None for out in outs] == [True, False, True, True]
    assert outs[0].output.images.shape == outs[2].output.images.shape
    assert "no_such" in str(outs[1].error)
    assert abs(outs[0].output.images - outs[3].output.images).max() < 1e-4
    assert outs[0].timings.mean_batch_requests > 1
    assert engine.step([]) == []


def test_a_timeout_passes_while_the_worker_is_busy(engine: DiffusionEngine, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting, pipe = busy(engine, pool, tmp_path)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            engine.collective_rpc("pid", timeout=0.2)
        assert 0.2 <= time.monotonic() - begun < 60
        assert not waiting.done(), "the worker is busy still"
        pipe.write_text("done")
        assert waiting.result() == "done"
    assert engine.collective_rpc("pid", timeout=60, unique_reply_rank=0) > 0


def test_what_a_call_raises_comes_back(engine: DiffusionEngine) -> None:
    with pytest.raises(GenerationFailed, match="ZeroDivisionError: as asked"):
        engine.collective_rpc("boom", timeout=60)


def test_abort_from_another_thread_ends_the_wait_while_the_worker_is_busy(
    engine: DiffusionEngine, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting, pipe = busy(engine, pool, tmp_path)
        step = pool.submit(engine.step, [request(900, request_id="long"), request(2, request_id="short")])
        while not engine.abort("long"):  # until the other thread has submitted it
            os.sched_yield()
        assert not step.done(), "the other request waits for the worker"
        pipe.write_text("done")
        waiting.result()
        long, short = step.result(60)
        assert isinstance(long.error, RequestCancelled)
        assert short.error is None
    assert engine.abort("long") is False
    assert engine.collective_rpc("stats", timeout=60, unique_reply_rank=0).resident == 0


@pytest.mark.slow
def test_close_from_another_thread_ends_every_wait(tiny_model: Path, tmp_path: Path) -> None:
    engine = make(tiny_model)
    worker = psutil.Process(engine.collective_rpc("pid", unique_reply_rank=0))
    with ThreadPoolExecutor(3) as pool:
        waiting, _ = busy(engine, pool, tmp_path)  # nobody will ever write
        step = pool.submit(engine.step, [request(900), request(900, request_id="known")])
        health = pool.submit(engine.check_health)
        closers = [threading.Thread(target=engine.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(60)
            assert not closer.is_alive()
        with pytest.raises(EngineNotRunning):
            waiting.result(60)
        with pytest.raises(EngineError):
            health.result(60)
        with contextlib.suppress(EngineNotRunning):  # it came too late to be accepted
            assert all(isinstance(out.error, RequestCancelled) for out in step.result(60))
    assert not worker.is_running()
    engine.close()
    for call in (engine.check_health, lambda: engine.step([request()]), lambda: engine.collective_rpc("pid")):
        with pytest.raises(EngineNotRunning):
            call()


@pytest.mark.slow
def test_health_after_the_workers_death(tiny_model: Path) -> None:
    with make(tiny_model, max_retries=0, start_timeout_s=60) as engine:
        engine.check_health()
        first = psutil.Process(engine.collective_rpc("pid", unique_reply_rank=0))
        os.kill(first.pid, signal.SIGKILL)
        first.wait(60)
        (out,) = engine.step([request()])
        assert out.error is None, "a worker is replaced, and whoever waits is served"
        engine.check_health()
        assert engine.collective_rpc("pid", unique_reply_rank=0) != first.pid


@pytest.mark.slow
def test_health_when_no_worker_comes_back(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tiny_model, max_retries=0) as engine:
        worker = psutil.Process(engine.collective_rpc("pid", unique_reply_rank=0))
        monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
        os.kill(worker.pid, signal.SIGKILL)
        with contextlib.suppress(EngineError):  # if the engine has known of the death before
            (out,) = engine.step([request(900)])
            assert out.error is not None
        with pytest.raises(EngineError):
            engine.check_health()
