"""``SystemExit`` and the like out of a model's own code: its failure, and nobody else's end. A signal's still ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio.to_thread
import greenlet
import pytest
import tiny
import torch

from steploom import AsyncDiffusionEngine, codec
from steploom.config import EngineConfig
from steploom.errors import ConfigError, EngineError, GenerationFailed
from steploom.executor import AttachedExecutor
from steploom.protocol import ErrorInfo, NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.weave import exits

SMALL = {"height": 32, "width": 32, "max_sequence_length": 16}
PATHS = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
KINDS = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, greenlet.GreenletExit]


def exiting(kind: type[BaseException], whole: Any, culprit: Any) -> Any:
    """A forward that raises what would end a thread, or a process, for the arguments that ``culprit`` tells."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(culprit(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)):
            raise kind("exit")
        return whole(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_forward_raises_is_the_failure_of_one_request(kind: type[BaseException], monkeypatch: Any) -> None:
    """Of three that share forwards, only the one whose latents are huge."""
    pipe = tiny.sd3()
    transformer = type(pipe.transformer)
    monkeypatch.setattr(transformer, "forward", exiting(kind, transformer.forward, lambda x: x.abs().max() > 1e5))
    huge = torch.full((1, pipe.transformer.config.in_channels, 16, 16), 1e6)
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        one, failed, other = await asyncio.gather(
            engine.generate("a", seed=1, num_inference_steps=3, **SMALL),
            engine.generate("b", seed=1, num_inference_steps=3, latents=huge, **SMALL),
            engine.generate("c", seed=2, num_inference_steps=3, **SMALL),
            return_exceptions=True,
        )
        assert isinstance(failed, GenerationFailed)
        assert f"forward of transformer raised {kind.__name__}: exit" in str(failed)
        assert len(one.images) == len(other.images) == 1


@pytest.mark.parametrize(("component", "method"), [("text_encoder", "forward"), ("vae", "decode")])
async def test_so_is_what_an_encoder_or_decoder_raises(component: str, method: str, monkeypatch: Any) -> None:
    pipe = tiny.sd3()
    module, broken = type(getattr(pipe, component)), [False]
    monkeypatch.setattr(module, method, exiting(SystemExit, getattr(module, method), lambda _: broken[0]))
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        broken[0] = True
        with pytest.raises(GenerationFailed, match=f"{method} of {component} raised SystemExit: exit"):
            await engine.generate("b", seed=1, num_inference_steps=2, **SMALL)
        broken[0] = False
        assert len((await engine.generate("c", num_inference_steps=1, **SMALL)).images) == 1


@pytest.mark.parametrize(
    ("factory", "said"),
    [("exits", "SystemExit: 3"), ("interrupts", "KeyboardInterrupt"), ("generator_exits", "GeneratorExit")],
)
@pytest.mark.parametrize("backend", ["inproc", pytest.param("mp", marks=pytest.mark.slow)])
async def test_what_a_factory_raises_is_told(backend: str, factory: str, said: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    config = {"model": f"exiting_model:{factory}", "distributed_executor_backend": backend, "device": "cpu"}
    with pytest.raises(
        ConfigError, match=rf"model='exiting_model:{factory}': raised {said} \(.*exiting_model.py, line"
    ):
        async with AsyncDiffusionEngine(**config):
            pass


def test_ctrl_c_is_nobodys_fault_where_it_is_heard() -> None:
    """On the main thread, if nobody has arranged otherwise; elsewhere ``KeyboardInterrupt`` can only be a model's."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(exits.is_strangers(KeyboardInterrupt())))
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        seen.append(exits.is_strangers(KeyboardInterrupt()))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a worker process
        seen.append(exits.is_strangers(KeyboardInterrupt()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [True, False, True]
    assert exits.is_strangers(SystemExit(1))
    assert not any(map(exits.is_strangers, (exits.Ended(15), ValueError())))
    assert not greenlet.greenlet(lambda: exits.is_strangers(greenlet.GreenletExit())).switch(), "it is unwound"


@contextlib.contextmanager
def listening(address: Path) -> Any:
    command = [sys.executable, "-m", "steploom.worker", "--listen", str(address)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": PATHS}, stdout=subprocess.PIPE, text=True
    ) as worker:
        try:
            assert worker.stdout is not None
            assert "listens at" in worker.stdout.readline()
            yield worker
        finally:
            worker.kill()


async def ticks(executor: AttachedExecutor) -> None:
    """As many as it takes until a denoiser runs: texts are encoded beside them."""
    for number in range(1, 4):
        own = {"num_inference_steps": 1, "output_type": "latent", **SMALL}
        new = NewRequest(f"r{number}#0", DiffusionRequest("a", request_id=f"r{number}", seed=1, **own))
        await executor.execute_step(SchedulerOutput(number, scheduled_new_reqs=[new]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "number"),
    [
        ("terminated_forward", signal.SIGTERM), ("terminated_pipeline", signal.SIGTERM),
        ("interrupted_forward", signal.SIGINT),
    ],
)  # fmt: skip
async def test_a_signal_ends_a_listening_worker_whatever_runs(
    model: str, number: signal.Signals, tmp_path_factory: Any
) -> None:
    address = tmp_path_factory.mktemp("w") / "worker"
    with listening(address) as worker:
        executor = AttachedExecutor.at(address)(EngineConfig(model=f"exiting_model:{model}", device="cpu"))
        await executor.start()
        with pytest.raises(EngineError):
            await ticks(executor)
        assert await anyio.to_thread.run_sync(worker.wait, 60) == 128 + number
        await executor.shutdown()


@pytest.mark.slow
async def test_an_exit_of_a_forward_does_not_end_a_listening_worker(tmp_path_factory: Any) -> None:
    address = tmp_path_factory.mktemp("w") / "worker"
    with listening(address) as worker:
        backend = AttachedExecutor.at(address)
        config = {"model": "exiting_model:exiting_forward", "distributed_executor_backend": backend, "device": "cpu"}
        for _ in range(2):
            async with AsyncDiffusionEngine(**config) as engine:
                with pytest.raises(GenerationFailed, match="forward of transformer raised SystemExit: 3"):
                    await engine.generate("a", num_inference_steps=1, **SMALL)
        assert worker.poll() is None


class Silent(RuntimeError):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "said"), [
    (RuntimeError("bad \ud800 text"), r"bad \\ud800 text"),
    (Silent(), r"Silent: \(its message cannot be made\)"),
    (RuntimeError("x" * 1_000_000), r"x+ \[\.\.\. \d+ characters \.\.\.\] x+$"),
], ids=["surrogate", "silent", "long"])  # fmt: skip
async def test_what_cannot_be_told_is_told_as_far_as_it_can(fault: Exception, said: str) -> None:
    """To the engine, it travels; and nobody else is hurt."""
    pipe = tiny.sd3()

    def broken(*_: Any) -> None:
        raise fault

    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        hook = pipe.vae.decoder.register_forward_pre_hook(broken)
        with pytest.raises(GenerationFailed, match=said) as caught:
            await engine.generate("a", seed=1, num_inference_steps=2, **SMALL)
        hook.remove()
        told = ErrorInfo.of(caught.value, caught.value.remote_traceback or "")
        assert codec.decode(codec.encode(told), ErrorInfo) == told
        assert codec.size(codec.encode(told)) < 2**18
        await engine.generate("a", seed=1, num_inference_steps=2, **SMALL)


class Leaving:
    """A worker's extension."""

    def leave(self) -> None:
        raise SystemExit(3)

    def interrupt(self) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mp", "inproc"])
async def test_an_extension_that_exits_fails_its_call_alone(backend: str) -> None:
    own = {"distributed_executor_backend": backend, "worker_extension": f"{__name__}.Leaving", "costs_file": None}
    async with AsyncDiffusionEngine(model="demo", torch_threads=1, **own) as engine:
        for method, said in (("leave", "SystemExit: 3"), ("interrupt", "KeyboardInterrupt")):
            with pytest.raises(GenerationFailed, match=said):
                await engine.collective_rpc(method)
        assert engine.recovering is None
        assert len((await engine.generate("a", num_inference_steps=1)).images) == 1
