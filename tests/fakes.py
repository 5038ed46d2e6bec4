"""Test doubles for the engine: executors without a model, whose every tick the test can hold and release."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio

from steploom import AsyncDiffusionEngine, DiffusionOutput, DiffusionRequest, EngineConfig, EngineError
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.protocol import ErrorInfo, Parameter, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput

PARAMETERS = ("prompt", "num_inference_steps", "guidance_scale", "width", "height", "fail_at", "num_images_per_prompt",
              "generator", "callback_on_step_end", "image", "swallow")  # fmt: skip


class FakeExecutor(DiffusionExecutor):
    """A worker that only counts steps.

    Requests take ``num_inference_steps`` ticks and answer with their prompt; ``fail_at=n`` fails in step n. While
    ``held``, each tick waits for :meth:`release`.
    """

    in_process = False

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.resident: dict[str, tuple[DiffusionRequest, int]] = {}
        self.log: list[SchedulerOutput] = []
        self.held = False
        self.rpcs: list[tuple[Any, ...]] = []
        self.rpc_gate: anyio.Event | None = None
        self.max_resident = 0
        self.shut = 0
        self._permits = anyio.Semaphore(0)
        self._ticking = anyio.Event()
        self._failed = anyio.Event()
        self._error: EngineError | None = None
        self.tick_error: Exception | None = None

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress("loading nothing")
        await anyio.lowlevel.checkpoint()
        return PipelineInfo(
            pipeline_class="FakePipeline",
            parameters=[Parameter(name, required=name == "prompt") for name in PARAMETERS],
            default_steps=4,
            default_size=(64, 64),
            in_process=self.in_process,
        )

    def release(self, ticks: int = 1) -> None:
        """Lets that many held ticks pass."""
        for _ in range(ticks):
            self._permits.release()

    def let_go(self) -> None:
        """Holds no more."""
        self.held = False
        self.release()

    async def ticking(self) -> None:
        """Returns when a tick is held."""
        await self._ticking.wait()

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self.log.append(output)
        if self.held:
            self._ticking.set()
            await self._permits.acquire()
            self._ticking = anyio.Event()
        else:
            await anyio.lowlevel.checkpoint()
        if self.tick_error is not None:
            raise self.tick_error
        return self.answer(output)

    def answer(self, output: SchedulerOutput) -> RunnerOutput:
        """One tick."""
        for run in output.finished_req_ids:
            self.resident.pop(run, None)
        for new in output.scheduled_new_reqs:
            self.resident[new.run_id] = (new.request, 0)
        self.max_resident = max(self.max_resident, len(self.resident))
        return RunnerOutput(tick=output.tick, reports=[self._step(run, len(output.run_ids)) for run in output.run_ids])

    def _step(self, run: str, mates: int) -> RequestReport:
        request, done = self.resident[run]
        done += 1
        total = request.params.get("num_inference_steps", 4)
        report = RequestReport(
            run_id=run, phase="denoise", stepped=True, step=done, total_steps=total, batch_key="fake",
            batch_requests=mates, latents=f"latents {done}" if _due(done, request.latents_every) else None,
            preview=f"preview {done}" if _due(done, request.preview_every) else None,
        )  # fmt: skip
        if done == request.params.get("fail_at"):
            report.error = ErrorInfo("GenerationFailed", "ValueError: bad luck", "Traceback ...")
        report.finished = report.error is not None or done == total
        if report.finished:
            del self.resident[run]
            report.output = None if report.error else SimpleNamespace(images=[request.prompt])
        else:
            self.resident[run] = (request, done)
        return report

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None) -> Any:
        self.rpcs.append((method, timeout, args, kwargs, unique_reply_rank))
        if self.rpc_gate is not None:
            await self.rpc_gate.wait()
        else:
            await anyio.lowlevel.checkpoint()
        return ["pong"] if unique_reply_rank is None else "pong"

    async def check_health(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def sleep(self, level: int = 1) -> None:
        await self.collective_rpc("sleep", None, (level,))

    async def wake_up(self) -> None:
        await self.collective_rpc("wake_up")

    def die(self, error: EngineError) -> None:
        """The worker's death."""
        self._error = error
        self._failed.set()

    async def wait_failed(self) -> EngineError:
        await self._failed.wait()
        assert self._error is not None
        return self._error

    async def shutdown(self) -> None:
        self.resident.clear()
        self.shut += 1
        await anyio.lowlevel.checkpoint()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class InProcessFake(FakeExecutor):
    """A fake that takes what cannot travel."""

    in_process = True


class WholeFake(FakeExecutor):
    """A fake of a remote system: whole requests, each held until the test releases its prompt."""

    granularity = "request"

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.gates: dict[str, anyio.Event] = {}
        self.cancelled: list[str] = []

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        raise AssertionError("an executor of whole requests gets no ticks")

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        (request,) = requests
        gate = self.gates[request.prompt] = anyio.Event()
        self.max_resident = max(self.max_resident, len(self.gates))
        try:
            await gate.wait()
        except BaseException:
            self.cancelled.append(request.prompt)
            raise
        finally:
            del self.gates[request.prompt]
        if request.params.get("fail_at"):
            raise ValueError("bad luck")
        return [DiffusionOutput(request_id=request.request_id, output=SimpleNamespace(images=[request.prompt]))]


@contextlib.asynccontextmanager
async def fake_engine(kind: type[FakeExecutor] = FakeExecutor, **config: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A running engine over a fake executor, and that executor."""
    async with AsyncDiffusionEngine(EngineConfig(distributed_executor_backend=kind, **config)) as engine:
        executor = engine._core.executor
        yield engine, executor
        if not engine._core.ended.is_set() and engine._core.failure is None:
            await settled(engine)
            assert_empty(engine)


async def settled(engine: Any) -> None:
    """Returns when the engine has nothing to do: finished requests forgotten by the worker too."""
    await engine._core.idled()


def assert_empty(engine: Any) -> None:
    """Nothing of any request is left, on either side."""
    core = engine._core
    assert core.scheduler.num_waiting == core.scheduler.num_running == 0
    assert not any(lane.ticking.scheduler.has_work for lane in core.lanes)
    assert not core.live
    assert not core.live.timers
    assert not core._calls
    if isinstance(core.executor, FakeExecutor):
        assert not core.executor.resident
