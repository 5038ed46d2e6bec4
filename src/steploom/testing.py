"""For the tests of your application: an engine like the real one that answers in milliseconds, without torch.

::

    from steploom.testing import FakeEngine

    async def test_my_app():
        async with FakeEngine() as engine:
            out = await engine.generate("a red circle", seed=1, num_inference_steps=4)
            assert out.images[0].size == (64, 64)

Requests are validated, queued, scheduled, streamed, cancelled and timed out by the real engine; only the model is not
there. The same prompt, seed and size give the same picture. With ``engine.hold()`` nothing goes on until
``engine.release(ticks)``: so a test says when a step happens, and sleeps for nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
from PIL import Image

from steploom import _pretended_text
from steploom.config import EngineConfig
from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.errors import ConfigError, EngineError, GenerationFailed
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

TEXT_TO_IMAGE = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height",
                 "num_images_per_prompt")  # fmt: skip
IMAGE_TO_IMAGE = (*TEXT_TO_IMAGE, "image", "strength")
INPAINTING = (*IMAGE_TO_IMAGE, "mask_image")
DEFAULT_STEPS = 8
DEFAULT_SIZE = (64, 64)
SIZE_MULTIPLE = 8
_GRAIN = 8
MAKES = ("images", "text")
FAIL = "fail"
"""A prompt that begins so fails in its second step, as if the pipeline had raised."""


class FakeEngine(AsyncDiffusionEngine):
    """An :class:`~steploom.AsyncDiffusionEngine` whose model is pretended.

    It serves text-to-image, image-to-image and inpainting, or is a language model. A prompt that begins with ``"fail"``
    fails; text that follows a prompt that begins with ``"short"`` ends by itself.

    Args:
        makes: ``"images"`` or ``"text"``.
        config: Fields of :class:`~steploom.EngineConfig`; ``distributed_executor_backend`` is taken.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, *, makes: str = "images", **config: Any) -> None:
        if "distributed_executor_backend" in config:
            raise ConfigError("distributed_executor_backend: FakeEngine has its own; leave it out")
        if makes not in MAKES:
            raise ConfigError(f"makes={makes!r}: must be one of {', '.join(map(repr, MAKES))}")
        self._gate = _Gate()
        super().__init__(**config, distributed_executor_backend=_FakeExecutor)
        self._make_executor = partial(_FakeExecutor, pipeline=self._gate, makes=makes)

    def hold(self) -> None:
        """From the next tick on nothing goes on by itself."""
        self._gate.held = True

    def release(self, ticks: int | None = None) -> None:
        """Lets so many ticks pass; with None holds no more."""
        self._gate.release(ticks)

    async def held(self) -> None:
        """Returns when a tick waits to be released."""
        await self._gate.waiting()


class _Gate:
    """Where ticks wait while they are held."""

    def __init__(self) -> None:
        self.held = False
        self._permits = 0
        self._waiters = 0
        self._changed = anyio.Event()

    def release(self, ticks: int | None) -> None:
        self.held = self.held and ticks is not None
        self._permits = 0 if ticks is None else self._permits + ticks
        self._notify()

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
        self._text = makes == "text"
        self._gate: _Gate = pipeline
        self._resident: dict[str, tuple[DiffusionRequest, int]] = {}
        self._stats = WorkerStats()
        self._failed = anyio.Event()

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        on_progress("pretending to load a model")
        if self._text:
            return _pretended_text.info()
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
            report.preview = _picture(request, 0, done / total)
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
            number = _rows(request) * (request.params.get("num_images_per_prompt") or 1)
            report.output = SimpleNamespace(images=[_picture(request, index, 1.0) for index in range(number)])
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
        answers: dict[str, Any] = {"ping": "pong", "stats": self._stats, "sleep": None, "wake_up": None}
        if method not in answers:
            raise GenerationFailed(f"AttributeError: the worker has no method {method!r}")
        return answers[method] if unique_reply_rank is not None else [answers[method]]

    async def wait_failed(self) -> EngineError:
        await self._failed.wait()
        return EngineError("unreachable: a pretended worker does not fail")

    async def shutdown(self) -> None:
        self._resident.clear()
        await anyio.lowlevel.checkpoint()


def _info(names: Sequence[str]) -> PipelineInfo:
    required = {"prompt", "image", "mask_image"}
    return PipelineInfo(
        pipeline_class="FakePipeline",
        parameters=[Parameter(name, name in required) for name in names],
        default_steps=DEFAULT_STEPS,
        default_size=DEFAULT_SIZE,
        size_multiple=SIZE_MULTIPLE,
        makes=["images"],
    )


def _rows(request: DiffusionRequest) -> int:
    return len(request.prompt) if isinstance(request.prompt, list) else 1


def _picture(request: DiffusionRequest, index: int, done: float) -> Image.Image:
    """Squares whose colours come from prompt, seed and place; the less is ``done``, the more of them are grey."""
    told = f"{request.prompt}|{request.seed}|{index}|{request.params.get('guidance_scale')}"
    draw = random.Random(hashlib.sha256(told.encode()).digest())
    colours = [tuple(int(128 + (draw.randrange(256) - 128) * done) for _ in range(3)) for _ in range(_GRAIN * _GRAIN)]
    picture = Image.new("RGB", (_GRAIN, _GRAIN))
    picture.putdata(colours)
    width, height = (request.params.get(side) for side in ("width", "height"))
    return picture.resize((width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1]), Image.Resampling.NEAREST)
