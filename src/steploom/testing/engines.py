"""The pretended engines, and the executor inside of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import anyio
import anyio.lowlevel

from steploom._pretended import MODELS
from steploom.config import EngineConfig
from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.engine.sync import DiffusionEngine
from steploom.errors import ConfigError, EngineError, EngineNotRunning, GenerationFailed, WorkerDied
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.protocol import (
    ErrorInfo,
    PipelineInfo,
    RequestReport,
    RunnerOutput,
    SchedulerOutput,
    WorkerStats,
)
from steploom.requests import DiffusionRequest
from steploom.worker import memory

FAIL = "fail"
"""A prompt that begins so fails in its second step, as if the pipeline had raised."""


class FakeEngine(AsyncDiffusionEngine):
    """An :class:`~steploom.AsyncDiffusionEngine` whose model is pretended.

    It serves text-to-image, image-to-image and inpainting; or it makes videos, from a prompt and, if given, a picture;
    or it is a language model. A prompt that begins with ``"fail"`` fails; text that follows a prompt that begins with
    ``"short"`` ends by itself. Latents are ``memoryview`` objects of float32, of which ``numpy.asarray`` makes an
    array; ``output_type="np"`` needs numpy, ``"pt"`` torch.

    Args:
        config: As the real engine's; ``distributed_executor_backend`` is taken.
        makes: ``"images"``, ``"videos"`` or ``"text"``.
        overrides: Fields of :class:`~steploom.EngineConfig` that differ from ``config``.

    Attributes:
        answers: What ``collective_rpc`` answers, by method, for those of a ``worker_extension``: a value, or a function
            of the call's arguments.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, config: EngineConfig | None = None, *, makes: str = "images", **overrides: Any) -> None:
        if "distributed_executor_backend" in overrides:
            raise ConfigError("distributed_executor_backend: FakeEngine has its own; leave it out")
        if makes not in MODELS:
            raise ConfigError(f"makes={makes!r}: must be one of {', '.join(map(repr, MODELS))}")
        self._gate = _Gate()
        super().__init__(config, **overrides, distributed_executor_backend=_FakeExecutor)
        self._make_executor = partial(_FakeExecutor, pipeline=self._gate, makes=makes)
        self.answers: dict[str, Any] = self._gate.answers

    @classmethod
    def from_pipeline(cls, pipe: Any, *, controlnet: Any = None, **config: Any) -> Self:
        """A pretended engine; ``pipe`` and ``controlnet`` may be anything, and are not looked at."""
        return cls(**config)

    def hold(self) -> None:
        """From the next tick on nothing goes on by itself. May be called from any thread."""
        self._gate.held = True

    def release(self, ticks: int | None = None) -> None:
        """Lets so many ticks pass; with None holds no more. May be called from any thread."""
        self._in_loop(partial(self._gate.release, ticks))

    def die(self) -> None:
        """The worker dies, and cannot be replaced: whatever runs fails with :class:`~steploom.WorkerDied`, and the
        engine is dead. May be called from any thread.
        """
        self._in_loop(self._gate.die)

    def _in_loop(self, change: Callable[[], None]) -> None:
        """Tests of a blocking client have the engine's loop in another thread."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is None or self._loop.is_closed() or self._loop is here:
            change()
        else:
            self._loop.call_soon_threadsafe(change)

    async def held(self) -> None:
        """Returns when a tick waits to be released."""
        await self._gate.waiting()


class FakeDiffusionEngine(DiffusionEngine):
    """The blocking twin: a :class:`~steploom.DiffusionEngine` whose model is pretended.

    Args:
        config: As :class:`FakeEngine` takes it.
        overrides: Likewise.

    Attributes:
        fake: The :class:`FakeEngine` inside, to be held, released and let die.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, config: EngineConfig | None = None, **overrides: Any) -> None:
        self.fake = FakeEngine(config, **overrides)
        self._start(self.fake)

    @classmethod
    def from_pipeline(cls, pipe: Any, *, controlnet: Any = None, **config: Any) -> Self:
        """A pretended engine; ``pipe`` and ``controlnet`` may be anything, and are not looked at."""
        return cls(**config)


class _Gate:
    """Where ticks wait while they are held, and what else a test says to the pretended worker."""

    def __init__(self) -> None:
        self.held = False
        self.answers: dict[str, Any] = {}
        self.dead = False
        self._permits = 0
        self._waiters = 0
        self._changed = anyio.Event()

    def release(self, ticks: int | None) -> None:
        self.held = self.held and ticks is not None
        self._permits = 0 if ticks is None else self._permits + ticks
        self._notify()

    def die(self) -> None:
        self.dead = True
        self._notify()

    def renew(self) -> None:
        """Another start, perhaps in another event loop."""
        self.dead, self._waiters = False, 0
        self._notify()

    async def died(self) -> None:
        """Returns when the worker has died."""
        while not self.dead:
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def passed(self) -> None:
        """Returns when a tick may go on."""
        await anyio.lowlevel.checkpoint()
        self._waiters += 1
        self._notify()
        try:
            while self.held and not self._permits:
                await self._changed.wait()
            self._permits = max(0, self._permits - 1)
        finally:
            self._waiters -= 1

    async def waiting(self) -> None:
        """Returns when a tick waits here."""
        while not (self._waiters and self.held and not self._permits):
            await self._changed.wait()


class _FakeExecutor(DiffusionExecutor):
    """Counts steps; what they make is a pretended model's business."""

    def __init__(self, config: EngineConfig, pipeline: Any = None, makes: str = "images") -> None:
        super().__init__(config, pipeline)
        self._model = MODELS[makes]
        self._gate: _Gate = pipeline
        self._resident: dict[str, tuple[DiffusionRequest, int]] = {}
        self._serves = False
        self._stats = WorkerStats()

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress("pretending to load a model")
        self._gate.renew()
        self._serves = True
        return self._model.info()

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self._check()
        await self._gate.passed()
        for run in output.finished_req_ids:
            self._resident.pop(run, None)
        for new in output.scheduled_new_reqs:
            self._resident[new.run_id] = (new.request, 0)
        self._stats.ticks += 1
        runs = [run for run in output.run_ids if run in self._resident]
        reports = [self._step(run, len(runs)) for run in runs]
        self._stats.resident = len(self._resident)
        return RunnerOutput(tick=output.tick, reports=reports)

    def _step(self, run: str, mates: int) -> RequestReport:
        request, done = self._resident[run]
        done, total = done + 1, self._model.total_steps(request)
        report = RequestReport(
            run_id=run, phase="denoise", stepped=True, step=done, total_steps=total, sigma=1 - done / total,
            batch_key="fake", batch_requests=float(mates), rows=2,
        )  # fmt: skip
        self._model.tell(report, request)
        if self._model.said_to(request).startswith(FAIL) and done == min(2, total):
            report.error = ErrorInfo("GenerationFailed", f"ValueError: {request.prompt}")
        report.finished = report.error is not None or done == total
        if not report.finished:
            self._resident[run] = (request, done)
            return report
        del self._resident[run]
        report.phase = "done"
        if report.error is None:
            self._model.finish(report, request)
        return report

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        self._check()
        with anyio.fail_after(timeout):
            await anyio.lowlevel.checkpoint()
        self._stats.memory = memory.held()
        own: dict[str, Any] = {"ping": "pong", "stats": self._stats, "sleep": None, "wake_up": None}
        answers = {**own, **self._gate.answers}
        if method not in answers:
            mend = f"give it an answer: engine.answers[{method!r}] = ..."
            raise GenerationFailed(f"AttributeError: the worker has no method {method!r}; {mend}")
        answer = answers[method]
        if callable(answer):
            answer = answer(*args, **(kwargs or {}))
        return answer if unique_reply_rank is not None else [answer]

    def _check(self) -> None:
        if not self._serves:
            raise EngineNotRunning("the engine was not started, or is closed")
        if self._gate.dead:
            raise WorkerDied(0, -9, "FakeEngine.die()")

    async def wait_failed(self, worker: int = 0) -> EngineError:
        await self._gate.died()
        return WorkerDied(0, -9, "FakeEngine.die()")

    async def shutdown(self) -> None:
        self._serves = False
        self._resident.clear()
        await anyio.lowlevel.checkpoint()
