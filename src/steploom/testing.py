"""For the tests of your application: an engine like the real one that answers in milliseconds, without torch.

::

    from steploom.testing import FakeEngine

    async def test_my_app():
        async with FakeEngine() as engine:
            out = await engine.generate("a red circle", seed=1, num_inference_steps=4)
            assert out.images[0].size == (64, 64)

Requests are validated, queued, scheduled, streamed, cancelled and timed out by the real engine; only the model is not
there. The same request and seed give the same picture. With ``engine.hold()`` nothing goes on until
``engine.release(ticks)``: so a test says when a step happens, and sleeps for nothing. ``engine.die()`` is the worker's
death. :class:`FakeDiffusionEngine` is the blocking twin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

import anyio
import anyio.lowlevel

from steploom import _pretended_text
from steploom._pretended_pictures import DEFAULT_SIZE, SIZE_MULTIPLE, films, floats, images, latents, picture
from steploom.config import EngineConfig
from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.engine.sync import DiffusionEngine
from steploom.errors import ConfigError, EngineError, GenerationFailed, WorkerDied
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.protocol import (
    ErrorInfo,
    Parameter,
    PipelineInfo,
    RequestReport,
    RunnerOutput,
    SchedulerOutput,
    WorkerStats,
)
from steploom.requests import DiffusionRequest
from steploom.worker import memory

TEXT_TO_IMAGE = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height",
                 "num_images_per_prompt")  # fmt: skip
IMAGE_TO_IMAGE = (*TEXT_TO_IMAGE, "image", "strength")
INPAINTING = (*IMAGE_TO_IMAGE, "mask_image")
TEXT_TO_VIDEO = (*TEXT_TO_IMAGE[:-1], "num_frames", "num_videos_per_prompt", "image")
DEFAULT_STEPS = 8
MAKES = ("images", "videos", "text")
DEFAULT_FRAMES = 17
FRAME_MULTIPLE = 4
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
        if makes not in MAKES:
            raise ConfigError(f"makes={makes!r}: must be one of {', '.join(map(repr, MAKES))}")
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
        """The worker dies: whatever runs fails with :class:`~steploom.WorkerDied`. May be called from any thread."""
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
    """Counts steps, and draws pictures of coloured squares, or says words."""

    def __init__(self, config: EngineConfig, pipeline: Any = None, makes: str = "images") -> None:
        super().__init__(config, pipeline)
        self._text, self._videos = makes == "text", makes == "videos"
        self._gate: _Gate = pipeline
        self._resident: dict[str, tuple[DiffusionRequest, int]] = {}
        self._stats = WorkerStats()

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress("pretending to load a model")
        self._gate.renew()
        if self._text:
            return _pretended_text.info()
        if self._videos:
            info = _info(TEXT_TO_VIDEO, required=("prompt",))
            info.makes, info.default_frames, info.frame_multiple = ["videos"], DEFAULT_FRAMES, FRAME_MULTIPLE
            return info
        tasks = {"text-to-image": TEXT_TO_IMAGE, "image-to-image": IMAGE_TO_IMAGE, "inpainting": INPAINTING}
        info = {task: _info(names) for task, names in tasks.items()}
        main = _info(TEXT_TO_IMAGE)
        main.tasks = {task: [one] for task, one in info.items()}
        return main

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
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
        done, total = done + 1, request.params.get("num_inference_steps") or DEFAULT_STEPS
        total = _pretended_text.total_steps(request) if self._text else total
        report = RequestReport(
            run_id=run, phase="denoise", stepped=True, step=done, total_steps=total, sigma=1 - done / total,
            batch_key="fake", batch_requests=float(mates), rows=2,
        )  # fmt: skip
        if self._text:
            _pretended_text.tell(report, request, done)
        elif request.preview_every and done % request.preview_every == 0:
            report.preview = picture(request, 0, done / total)
        if not self._text and request.latents_every and done % request.latents_every == 0:
            report.latents = latents(request, [done], total)
        if _pretended_text.said_to(request).startswith(FAIL) and done == min(2, total):
            report.error = ErrorInfo("GenerationFailed", f"ValueError: {request.prompt}")
        report.finished = report.error is not None or done == total
        if not report.finished:
            self._resident[run] = (request, done)
            return report
        del self._resident[run]
        report.phase = "done"
        if report.error is None and self._text:
            report.output = _pretended_text.output(request)
        elif report.error is None:
            report.output = SimpleNamespace(images=images(request, total))
            if self._videos:
                report.output = SimpleNamespace(frames=films(request, DEFAULT_FRAMES))
            if request.return_trajectory:
                steps = range(1, total + 1)
                report.trajectory_latents = latents(request, steps, total, trajectory=True)
                report.trajectory_timesteps = floats([1000 * (1 - (step - 1) / total) for step in steps], [total])
        return report

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
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

    async def wait_failed(self) -> EngineError:
        await self._gate.died()
        return WorkerDied(0, -9, "FakeEngine.die()")

    async def shutdown(self) -> None:
        self._resident.clear()
        await anyio.lowlevel.checkpoint()


def _info(names: Sequence[str], required: Sequence[str] = ("prompt", "image", "mask_image")) -> PipelineInfo:
    return PipelineInfo(
        pipeline_class="FakePipeline",
        parameters=[Parameter(name, name in required) for name in names],
        default_steps=DEFAULT_STEPS,
        default_size=DEFAULT_SIZE,
        size_multiple=SIZE_MULTIPLE,
        makes=["images"],
    )
