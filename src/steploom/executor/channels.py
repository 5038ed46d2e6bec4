"""ChannelExecutor: what the executors that speak to their workers over channels have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import anyio

from steploom.config import EngineConfig
from steploom.config.values import is_seconds
from steploom.errors import EngineDead, EngineError, EngineNotRunning, InvalidRequest
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback
from steploom.executor.channel import MAX_TICKS, Channel
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.worker.messages import Ready

MAX_CALLS = 64
"""Calls in flight; a 65th waits."""

logger = logging.getLogger("steploom.worker")


class ChannelExecutor(DiffusionExecutor):
    """An executor that speaks to its workers over channels; subclasses fill ``_channels`` and close them."""

    ticks_in_flight = MAX_TICKS

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._channels: list[Channel] = []
        self._call_slots = anyio.Semaphore(MAX_CALLS, fast_acquire=True)

    async def start(self, on_progress: ProgressCallback | None = None) -> PipelineInfo:
        """Starts; see :meth:`DiffusionExecutor.start`."""
        try:
            return await super().start(on_progress)
        except BaseException:
            await self.shutdown()  # shields itself: also when it is a cancellation that ends the start
            raise

    async def _ready(self, on_progress: ProgressCallback) -> list[Ready]:
        """What the workers say when they have loaded."""
        for channel in self._channels:
            channel.on_progress = on_progress
        ready = [channel.ready for channel in self._channels]
        done, _ = await asyncio.wait(ready, return_when=asyncio.FIRST_EXCEPTION)  # all load at a time; one may fail
        for future in done:
            future.result()
        for channel in self._channels:
            channel.on_progress = logger.info
        return [future.result() for future in ready]

    def _running(self) -> list[Channel]:
        if not self._channels:
            raise EngineNotRunning("the executor was not started, or is closed")
        return self._channels

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        """Executes one tick; see :meth:`DiffusionExecutor.execute_step`."""
        channel = self._running()[output.worker]
        async with channel.slots:
            return await channel.tick(output)

    def amend(self, output: SchedulerOutput) -> None:
        """Adds to a tick that is in flight; see :meth:`DiffusionExecutor.amend`."""
        self._running()[output.worker].amend(output)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Calls a method of every worker; see :meth:`DiffusionExecutor.collective_rpc`."""
        channels = self._running()
        _check_waiting(timeout, unique_reply_rank, len(channels))
        limit_s = self.config.call_timeout_s if timeout is None else None
        with anyio.fail_after(timeout):
            results = await self._call(channels, limit_s, method, args, kwargs)
        return results if unique_reply_rank is None else results[unique_reply_rank]

    async def _call(
        self,
        channels: list[Channel],
        limit_s: float | None,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Calls a method of these workers; one that takes longer than ``limit_s`` when its turn has come is lost."""
        _check_call(method, args, kwargs)
        channels = list(channels)  # others may come and go while long arguments are written
        async with self._call_slots:
            prepared = [await channel.prepared(method, args, kwargs or {}) for channel in channels]
            calls = [(one, *one.call(call, limit_s)) for one, call in zip(channels, prepared, strict=True)]
            try:
                return [await future for _, _, future in calls]
            finally:
                for channel, number, future in calls:
                    channel.withdraw(number)
                    if future.done() and not future.cancelled():
                        future.exception()  # nobody asks for it where that of another worker is raised

    async def check_health(self) -> None:
        """Returns if every worker answers; one that does not is lost. See :meth:`DiffusionExecutor.check_health`."""
        limit_s = self.config.tick_timeout_s
        try:
            with anyio.fail_after(2 * limit_s):  # a tick may be under way, which takes its time and is no fault
                await self._call(self._running(), limit_s, "ping")
        except TimeoutError:
            raise EngineError(f"a worker is busy, and did not answer within twice tick_timeout_s={limit_s}") from None

    async def sleep(self, level: int = 1, worker: int | None = None) -> None:
        """Frees the devices, or one of them; see :meth:`DiffusionExecutor.sleep`."""
        channels = self._running()
        which = channels if worker is None else [channels[worker]]
        await self._call(which, self.config.start_timeout_s, "sleep", (level,))

    async def wake_up(self) -> None:
        """Brings the weights back; see :meth:`DiffusionExecutor.wake_up`."""
        await self._call(self._running(), self.config.start_timeout_s, "wake_up")

    async def wait_failed(self, worker: int = 0) -> EngineError:
        """Returns why the worker has failed; see :meth:`DiffusionExecutor.wait_failed`."""
        channel = self._running()[worker]
        await channel.failed.wait()
        assert channel.failure is not None
        error = channel.failure()
        return error if isinstance(error, EngineError) else EngineDead(str(error))


def _check_call(method: object, args: object, kwargs: object) -> None:
    """Refuses here what the worker could not read: a message that does not decode ends it.

    Raises:
        InvalidRequest: Names the argument.
    """
    if not isinstance(method, str):
        raise InvalidRequest(f"method={method!r}: must be a str, the name of a method", field="method")
    if not isinstance(args, Sequence) or isinstance(args, str | bytes | bytearray):
        raise InvalidRequest(f"args={args!r}: must be a list or tuple of positional arguments", field="args")
    named = isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in cast("Mapping[object, Any]", kwargs))
    if kwargs is not None and not named:
        raise InvalidRequest(f"kwargs={kwargs!r}: must be a mapping of names to arguments", field="kwargs")


def _check_waiting(timeout: object, rank: object, workers: int) -> None:
    """Refuses what is no time to wait, and no worker to wait for.

    Raises:
        InvalidRequest: Names the argument.
    """
    if timeout is not None and not is_seconds(timeout):
        raise InvalidRequest(f"timeout={timeout!r}: must be a number of seconds, or None", field="timeout")
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < workers):
        there = "is one worker, rank 0" if workers == 1 else f"are {workers} workers, from rank 0"
        raise InvalidRequest(f"unique_reply_rank={rank!r}: there {there}", field="unique_reply_rank")
