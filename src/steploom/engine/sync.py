"""DiffusionEngine: the blocking twin, for scripts and threads. It drives the asyncio engine; there is no second one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import anyio

from steploom.config import EngineConfig
from steploom.engine.async_engine import AsyncDiffusionEngine, Prompt
from steploom.engine.loop_thread import Ending, LoopThread
from steploom.errors import EngineError, EngineNotRunning, InvalidRequest, RequestError
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.sched import Cost


class DiffusionEngine:
    """Serves one diffusion model to blocking code, from any thread.

    ::

        with DiffusionEngine(model="demo") as engine:
            outputs = engine.step([DiffusionRequest("a red circle"), DiffusionRequest("a blue square")])

    The engine starts when it is made and ends with the ``with`` block or :meth:`close`; one that was forgotten is
    closed when the interpreter ends. An event loop in one background thread runs it. Ctrl-C while a call waits aborts
    that call's requests before ``KeyboardInterrupt`` goes on.

    Args:
        config: Settings; None takes the defaults.
        overrides: Fields of :class:`~steploom.EngineConfig` that differ from ``config``.

    Raises:
        ConfigError: A setting is wrong.
        EngineError: A worker could not be started.
    """

    def __init__(self, config: EngineConfig | None = None, **overrides: Any) -> None:
        self._start(AsyncDiffusionEngine(config, **overrides))

    @classmethod
    def from_pipeline(cls, pipe: Any, *, controlnet: Any = None, **config: Any) -> Self:
        """As :meth:`AsyncDiffusionEngine.from_pipeline <steploom.AsyncDiffusionEngine.from_pipeline>`."""
        engine = cls.__new__(cls)
        engine._start(AsyncDiffusionEngine.from_pipeline(pipe, controlnet=controlnet, **config))
        return engine

    def _start(self, engine: AsyncDiffusionEngine) -> None:
        self.config = engine.config
        self._engine = engine
        self._thread = LoopThread()
        self._ending = Ending(engine, self._thread)
        # A forgotten engine leaves no worker, and whoever happens to collect it does not wait for that.
        weakref.finalize(self, self._ending.soon).atexit = False  # at exit it is waited for
        try:
            self._limit = self._thread.call(self._start_in_loop)
        except BaseException:
            self.close()
            raise

    async def _start_in_loop(self) -> anyio.CapacityLimiter:
        await self._engine.start()
        return anyio.CapacityLimiter(self.config.max_waiting)

    def close(self) -> None:
        """Ends the engine; returns when nothing of it is left. May be called twice, and from any thread.

        In the engine's own event loop (an observer's) it cannot wait, and returns at once. In a fork of the process
        whose engine it is it does nothing.
        """
        self._ending.now()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> PipelineInfo:
        """The loaded pipeline."""
        return self._engine.info

    def step(self, requests: Iterable[DiffusionRequest]) -> list[DiffusionOutput]:
        """Runs whole requests, together, and returns when all are done.

        Any number may be given: at most ``max_waiting`` are queued at a time.

        Returns:
            One output per request, in their order; ``.error`` is set where a request failed.

        Raises:
            InvalidRequest: These are no requests. What is wrong with one of them is in its output's ``.error``.
            EngineError: The engine cannot serve.
        """
        return self._thread.call(partial(self._step_in_loop, _listed(requests)))

    async def _step_in_loop(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        outputs: dict[int, DiffusionOutput] = {}
        failures: list[EngineError] = []

        async def run(index: int, request: DiffusionRequest) -> None:
            try:
                async with self._limit:
                    try:
                        outputs[index] = await self._engine.generate(request)
                    finally:
                        self._follow()
            except (RequestError, EngineError) as error:
                served = self._engine.serves and not isinstance(error, EngineNotRunning)
                if isinstance(error, RequestError) or served:  # what answers whole requests has failed this one
                    outputs[index] = DiffusionOutput(request_id=request.request_id, seed=request.seed, error=error)
                    return
                failures.append(error)  # Raised below: the first one as it is, and not as a group.
                group.cancel_scope.cancel()

        self._follow()
        async with anyio.create_task_group() as group:
            for index, request in enumerate(requests):
                group.start_soon(run, index, request)
        if failures:
            raise failures[0]
        return [outputs[index] for index in range(len(requests))]

    def _follow(self) -> None:
        """As many are queued at a time as the engine takes, also when :meth:`reload` has changed that."""
        self._limit.total_tokens = self._engine.config.max_waiting

    def generate(self, prompt: Prompt = None, **params: Any) -> DiffusionOutput:
        """As :meth:`AsyncDiffusionEngine.generate <steploom.AsyncDiffusionEngine.generate>`, blocking."""
        return self._thread.call(partial(self._engine.generate, prompt, **params))

    def abort(self, request_id: str) -> bool:
        """Ends a request that another thread waits for. Returns whether it was alive."""
        return self._thread.call(partial(self._engine.abort, request_id))

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """As :meth:`AsyncDiffusionEngine.collective_rpc <steploom.AsyncDiffusionEngine.collective_rpc>`, blocking."""
        call = partial(self._engine.collective_rpc, method, timeout, args, kwargs, unique_reply_rank)
        return self._thread.call(call)

    def check_health(self) -> None:
        """Returns if the engine and its workers are alive and answer.

        Raises:
            EngineError: They are not, or do not.
        """
        self._thread.call(self._engine.check_health)

    def scale(self, workers: int, *, drain_s: float | None = None) -> None:
        """As :meth:`AsyncDiffusionEngine.scale <steploom.AsyncDiffusionEngine.scale>`."""
        self._thread.call(partial(self._engine.scale, workers, drain_s=drain_s))

    def costs(self) -> list[Cost]:
        """As :meth:`AsyncDiffusionEngine.costs <steploom.AsyncDiffusionEngine.costs>`."""

        async def ask() -> list[Cost]:
            return self._engine.costs()

        return self._thread.call(ask)

    def pause(self) -> None:
        """As :meth:`AsyncDiffusionEngine.pause <steploom.AsyncDiffusionEngine.pause>`."""
        self._thread.call(self._engine.pause)

    def resume(self) -> None:
        """As :meth:`AsyncDiffusionEngine.resume <steploom.AsyncDiffusionEngine.resume>`."""
        self._thread.call(self._engine.resume)

    def drain(self, timeout_s: float | None = None) -> int:
        """As :meth:`AsyncDiffusionEngine.drain <steploom.AsyncDiffusionEngine.drain>`, blocking."""
        return self._thread.call(partial(self._engine.drain, timeout_s))

    def reload(self, **overrides: Any) -> None:
        """As :meth:`AsyncDiffusionEngine.reload <steploom.AsyncDiffusionEngine.reload>`, blocking."""
        try:
            self._thread.call(partial(self._engine.reload, **overrides))
        finally:  # interrupted while the old model ends, the new one serves
            self.config = self._engine.config

    def sleep(self, level: int = 1) -> None:
        """Moves the weights off the device until :meth:`wake_up`; requests are refused meanwhile."""
        self._thread.call(partial(self._engine.sleep, level))

    def wake_up(self) -> None:
        """Moves the weights back."""
        self._thread.call(self._engine.wake_up)


def _listed(requests: object) -> list[DiffusionRequest]:
    """The requests that :meth:`DiffusionEngine.step` was given.

    Raises:
        InvalidRequest: It was given something else.
    """
    mend = "must be a list of DiffusionRequest: step([DiffusionRequest('a cat')])"
    if not isinstance(requests, Iterable) or isinstance(requests, str):
        raise InvalidRequest(f"requests={requests!r}: {mend}", field="requests")
    listed = list(cast("Iterable[Any]", requests))
    for index, request in enumerate(listed):
        if not isinstance(request, DiffusionRequest):
            raise InvalidRequest(f"requests[{index}]={request!r}: {mend}", field="requests")
    return listed
