"""AsyncDiffusionEngine: the engine as an asyncio application sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

from steploom.config import EngineConfig
from steploom.engine.checks.validation import make_config, make_request
from steploom.engine.core import EngineCore
from steploom.engine.costs_file import CostsFile, keep, learned, recall
from steploom.engine.observer import Observers
from steploom.engine.operated import OperatedEngine
from steploom.engine.operations import Operations
from steploom.engine.outlast import outlast
from steploom.engine.profiling import profile
from steploom.engine.stream import RequestStream
from steploom.errors import ConfigError, EngineError, EngineNotRunning, InvalidRequest, RequestCancelled, SteploomError
from steploom.executor import resolve_executor
from steploom.executor.abstract import ProgressCallback
from steploom.media.pictures import brief
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.sched import BaseScheduler, Cost, Fleet

_NOT_STARTED = "the engine was not started: use `async with engine`, or await engine.start()"
Prompt = str | list[str] | DiffusionRequest | None


class AsyncDiffusionEngine(OperatedEngine):
    """Serves one diffusion model to many tasks of one event loop.

    ::

        async with AsyncDiffusionEngine(model="demo") as engine:
            out = await engine.generate("a red circle", seed=1)

    Concurrent requests, each at its own step, share the model's forward passes. Nothing here ever blocks the event
    loop, and cancelling a task that waits for a request frees the request's slot by the next step.

    ``async with`` starts and closes; so do :meth:`start` and :meth:`close`, which may be called from different tasks.
    An engine belongs to the event loop that it was started in. Once closed it can be started again.

    Args:
        config: Settings; None takes the defaults.
        overrides: Fields of :class:`~steploom.EngineConfig` that differ from ``config``.

    Attributes:
        observers: Are told what the engine does; append your own :class:`~steploom.EngineObserver`.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(self, config: EngineConfig | None = None, **overrides: Any) -> None:
        self.config = make_config(config, overrides)
        self._make_executor = resolve_executor(self.config)
        self.observers = Observers()
        self._core: EngineCore | None = None
        self._operations = Operations()
        self._from_pipeline = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._costs_file: CostsFile | None = None

    @classmethod
    def from_pipeline(cls, pipe: Any, *, controlnet: Any = None, **config: Any) -> Self:
        """An engine for a pipeline that the application has loaded already; always in this process.

        ``pipe`` may be called directly meanwhile, and is as it was before once the engine is closed.

        Args:
            pipe: A diffusers pipeline. Requests may also name other tasks of its family (``task="image-to-image"``).
            controlnet: A ControlNet (several: a list), or where it is to be loaded from, for ``task="controlnet"``.
            config: Fields of :class:`~steploom.EngineConfig`, but ``model`` and ``distributed_executor_backend``.

        Raises:
            ConfigError: A setting is wrong, or ``pipe`` is None; when it starts, also if ``pipe`` is no pipeline.
        """
        if pipe is None:
            raise ConfigError("from_pipeline: got None, which is no diffusers pipeline; give a DiffusionPipeline")
        for name in ("model", "distributed_executor_backend"):
            if name in config:
                raise ConfigError(f"{name}={config[name]!r}: from_pipeline runs the given pipeline in this process")
        if isinstance(controlnet, str):
            config["controlnet"] = controlnet
        elif controlnet is not None:
            from steploom.worker.family import Given  # imports torch

            pipe = Given(pipe, controlnet)
        engine = cls(distributed_executor_backend="inproc", **config)
        engine._make_executor = partial(engine._make_executor, pipeline=pipe)
        engine._from_pipeline = True
        return engine

    async def start(self, on_progress: ProgressCallback | None = None) -> Self:
        """Loads the model and starts to serve. Cancelled, it leaves nothing behind.

        Args:
            on_progress: Is told, line by line, what is being loaded.

        Raises:
            ConfigError: A setting is wrong.
            EngineError: The engine runs already, or a worker could not be started.
        """
        if self._core is not None and not self._core.ended.is_set():
            raise EngineError("the engine runs already: close() it first, or use the running one")
        executor, self._operations = self._make_executor(self.config), Operations()
        core = self._core = EngineCore(self.config, executor, on_progress, self.observers, self._operations)
        self._operations.cores.append(core)
        self._loop = asyncio.get_running_loop()
        self._launch(core)
        try:
            await core.started.wait()
            if core.info is not None:
                self._costs_file = await recall(self.config, core.info, core.scheduler)
                if self.config.profile is not None and not self.costs():
                    await profile(self.generate, self.costs, self.config, on_progress)
            core.check_started()
        except BaseException:
            core.stop()
            await outlast(core.ended)
            raise
        return self

    def _launch(self, core: EngineCore) -> None:
        """Has ``core`` live.

        The one task that is not started by a task group: it owns the engine's group, which has to be entered and left
        in one task, while start() and close() may be called from different ones. It ends with close(), which waits for
        it, and never raises.
        """
        owner = asyncio.get_running_loop().create_task(core.run(), name="steploom engine")
        self._owners.add(owner)
        owner.add_done_callback(self._owners.discard)

    async def close(self) -> None:
        """Ends the engine, and returns when nothing of it is left; also if cancelled, which is raised afterwards.

        Requests that are not done raise :class:`~steploom.errors.RequestCancelled` in their waiters. Closing an engine
        that is not running does nothing.

        Raises:
            EngineNotRunning: It was started in another event loop.
        """
        if self._core is None or all(core.ended.is_set() for core in (self._core, *self._operations.cores)):
            return
        self._check_loop()
        core, file = self._core, self._costs_file
        state = learned(core.scheduler)
        cores = list(self._operations.cores)
        for each in cores:
            each.stop()
        try:
            for each in cores:
                await outlast(each.ended)
        finally:
            await keep(file, state)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_ended(self) -> SteploomError | None:
        """Returns once it serves no more: the fault that ended it, or None if it was closed, or never started."""
        if self._core is None:
            return None
        while True:
            core = self._core
            await core.ended.wait()
            if core is self._core:  # else reload() has replaced it
                return core.failure

    def check_serving(self) -> None:
        """Returns if requests are taken, as far as is known here; :meth:`check_health` asks the workers too.

        Raises:
            EngineError: They are not; says why.
        """
        self._serving()

    @property
    def info(self) -> PipelineInfo:
        """The loaded pipeline.

        Raises:
            EngineNotRunning: The engine has not started.
        """
        if self._core is None or self._core.info is None:
            raise EngineNotRunning(_NOT_STARTED)
        return self._core.info

    @property
    def serves(self) -> bool:
        """Whether it has started, and has neither been closed nor failed; :meth:`check_serving` says why not."""
        return self._core is not None and self._core.serves

    @property
    def recovering(self) -> EngineError | None:
        """What a worker was lost by, while it is being replaced, and others may serve (:attr:`workers`). Else None."""
        return self._core.lanes.fault if self._core is not None and self.serves else None

    @property
    def workers(self) -> list[str]:
        """What the workers do, by rank: ``"serves"``, ``"recovering"`` or ``"leaving"``; empty while there are none."""
        return [lane.state for lane in self._core.lanes] if self._core is not None and self.serves else []

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and wait for a worker; 0 while the engine does not serve."""
        return sum(core.scheduler.num_waiting for core in self._operations.cores) if self.serves else 0

    @property
    def num_running(self) -> int:
        """Requests that a worker holds; 0 while the engine does not serve."""
        return sum(core.scheduler.num_running for core in self._operations.cores) if self.serves else 0

    async def generate(self, prompt: Prompt = None, **params: Any) -> DiffusionOutput:
        """Runs one request. Cancelling the awaiting task frees its slot by the next step.

        Args:
            prompt: The prompt, or a ready request.
            params: Our own fields, as :class:`~steploom.DiffusionRequest` lists them; everything else goes to the
                pipeline's ``__call__`` under diffusers' own names.

        Raises:
            InvalidRequest: The request does not fit the pipeline or the limits.
            QueueFull: No place in the waiting queue.
            DeadlineExceeded: ``timeout`` passed (also a ``TimeoutError``).
            RequestCancelled: Aborted by :meth:`abort`, or by closing the engine.
            GenerationFailed: The pipeline raised.
            EngineError: The engine cannot serve.
        """
        async with RequestStream(make_request(prompt, params).without_drafts(), self._serving) as run:
            return await run.result()

    def stream(self, prompt: Prompt = None, **params: Any) -> RequestStream:
        """The handle of one request, submitted when it is entered, aborted when it is left early.

        Args and raises: as :meth:`generate`, on entering.
        """
        return RequestStream(make_request(prompt, params), self._serving)

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its waiter gets :class:`~steploom.errors.RequestCancelled`.

        Returns:
            Whether the request was alive.

        Raises:
            EngineError: The engine cannot serve.
            InvalidRequest: ``request_id`` is none: several are ended one by one.
        """
        self._serving()
        given = cast("object", request_id)
        if not isinstance(given, str):
            raise InvalidRequest(
                f"request_id={brief(given)}: must be one request's id; abort several one by one", field="request_id"
            )
        error = RequestCancelled(f"request {request_id} was aborted")
        return self._operations.abort(request_id, error)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Calls a method of every worker, between two ticks, while generations go on.

        Args:
            method: ``"stats"``, ``"ping"``, or a method of ``EngineConfig.worker_extension``.
            timeout: Seconds, end to end. None: a worker may take ``call_timeout_s`` when its turn has come; then it is
                replaced.
            args: Positional arguments. Over worker processes long ones are written in a thread: leave them as they are
                until the answer is here.
            kwargs: Keyword arguments; likewise.
            unique_reply_rank: Of this worker only the answer is wanted.

        Returns:
            The answers by rank, or with ``unique_reply_rank`` that worker's answer.

        Raises:
            TimeoutError: No answer in time.
            TickTimeout: No answer within ``call_timeout_s``.
            EngineError: The engine cannot serve.
        """
        core = self._serving()
        rpc = core.executor.collective_rpc
        return await core.ask(partial(rpc, method, timeout, args, kwargs, unique_reply_rank))

    async def check_health(self) -> None:
        """Returns if the engine and its workers are alive and answer. A worker that stands still is replaced.

        Raises:
            TickTimeout: A worker that does nothing else did not answer within ``tick_timeout_s``.
            EngineError: They are not, or do not; or a worker is being replaced (:attr:`recovering`), which needs no
                help.
        """
        core = self._serving()
        await core.ask(core.executor.check_health)

    def costs(self) -> list[Cost]:
        """What ticks cost, as learned so far: by batch key seconds by rows, the knee, and the text encoders and VAEs.

        Raises:
            EngineError: The engine cannot serve.
        """
        scheduler = self._serving().scheduler
        return scheduler.costs.shown() if isinstance(scheduler, BaseScheduler | Fleet) else []

    def _serving(self) -> EngineCore:
        """The core, if it can serve this caller.

        Raises:
            EngineNotRunning: Not started, closed, or called from another event loop.
            EngineDead: A fault ended it.
        """
        if self._core is None:
            raise EngineNotRunning(_NOT_STARTED)
        self._core.check_serving()
        self._check_loop()
        return self._core

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise EngineNotRunning(
                "the engine belongs to the event loop that it was started in: start one engine per event loop, or use "
                "DiffusionEngine, the blocking twin, which any thread may call"
            )
