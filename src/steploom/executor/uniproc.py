"""InprocExecutor: the runner on one thread of this process."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any, ClassVar

import anyio
import msgspec

from steploom.config import EngineConfig
from steploom.errors import ConfigError, EngineNotRunning
from steploom.executor.abstract import ProgressCallback
from steploom.executor.channel import Channel
from steploom.executor.channels import ChannelExecutor
from steploom.protocol import PipelineInfo
from steploom.worker.agenda import Agenda
from steploom.worker.gaps import Gaps
from steploom.worker.messages import Answer, Call, Close, Command, Progress, Ready
from steploom.worker.serving import (
    DEFAULT_RUNNER,
    Begun,
    Forget,
    Inbox,
    Obedience,
    RunnerLike,
    fatal,
    runner_factory,
)

SHUTDOWN_S = 30.0
"""``stop_timeout_s`` of a thread, which cannot be killed, unless it is given."""

logger = logging.getLogger(__name__)


class InprocExecutor(ChannelExecutor):
    """Executes ticks in a thread of this process, which makes the runner, uses it and closes it.

    Nothing is copied: generators, callbacks and tensors pass as they are. The device work holds Python's lock now and
    then, so the event loop is less smooth than with a worker process, and a crash of native code ends the application.
    """

    runner: ClassVar[str] = DEFAULT_RUNNER
    """Factory of the runner as ``"pkg.module:name"``, where no pipeline is given."""

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        if config.data_parallel_size != 1:
            raise ConfigError(f"data_parallel_size={config.data_parallel_size}: the in-process executor has one worker")
        self._agenda, self._gaps = Agenda(config.resident_limit), Gaps()
        self._inbox = _ThreadInbox(self._agenda, self._gaps)
        self._thread: threading.Thread | None = None
        self._ended: anyio.Event | None = None

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        if self._thread is not None:
            raise EngineNotRunning("an executor starts once; make a new one")
        unready = None if self.pipeline is None else "the pipeline given to from_pipeline could not be served"
        channel = Channel(0, self.config, self._inbox.put, unready=unready)
        self._channels = [channel]
        self._ended = anyio.Event()
        arguments = (asyncio.get_running_loop(), channel, self._ended)
        self._thread = threading.Thread(target=self._work, args=arguments, name="steploom-runner", daemon=True)
        self._thread.start()
        (ready,) = await self._ready(on_progress)
        return ready.info

    def _work(self, loop: asyncio.AbstractEventLoop, channel: Channel, ended: anyio.Event) -> None:
        """The thread: everything that touches the device happens here."""

        def say(answer: Answer) -> None:
            loop.call_soon_threadsafe(channel.receive, answer)

        try:
            try:
                self._serve(say)
            except BaseException as error:  # noqa: BLE001 - the thread's boundary: the engine hears of it
                say(fatal(error))
            loop.call_soon_threadsafe(ended.set)
        except RuntimeError:
            logger.warning("the event loop was closed before the engine; its runner has ended")

    def _serve(self, say: Any) -> None:
        runner = self._make_runner(say)
        try:
            say(Ready(msgspec.structs.replace(runner.info, in_process=True)))
            obedience = Obedience(runner, self._agenda, self._gaps)
            while not isinstance(command := self._inbox.take(), Close):
                answer = obedience.obey(command)
                if answer is not None:
                    say(answer)
                del command, answer
        finally:
            runner.close()

    def _make_runner(self, say: Any) -> RunnerLike:
        if self.pipeline is None:
            return runner_factory(self.runner)(self.config, lambda line: say(Progress(line)))
        from steploom.worker.runner import Runner  # imports torch

        return Runner.from_pipeline(self.pipeline, self.config)

    async def shutdown(self) -> None:
        """Ends the thread after the tick in flight; see :meth:`DiffusionExecutor.shutdown`."""
        for channel in self._channels:
            channel.fail(lambda: EngineNotRunning("the engine was closed"))
        self._channels = []
        if self._thread is None or self._ended is None:
            return
        self._inbox.put(Close())
        limit_s = SHUTDOWN_S if self.config.stop_timeout_s is None else self.config.stop_timeout_s
        with anyio.move_on_after(limit_s, shield=True):
            await self._ended.wait()
        if not self._ended.is_set():
            logger.warning("the runner's thread still works after %s s; it ends after its tick", limit_s)
            return
        self._thread.join()  # to say so was its last act: nothing of it is left when this returns


class _ThreadInbox:
    """An :class:`Inbox` that one thread fills and another empties. Bounded by the executor's slots."""

    def __init__(self, agenda: Agenda, gaps: Gaps) -> None:
        self._inbox = Inbox(agenda)
        self._gaps = gaps
        self._filled = threading.Condition()

    def put(self, command: Command) -> None:
        """Adds a command; never waits for the device."""
        with self._filled:
            self._inbox.put(command)
            self._filled.notify()

    def take(self) -> Begun | Call | Forget | Close:
        """The next command, when there is one."""
        with self._filled:
            if self._inbox.empty:
                since = time.perf_counter()
                while self._inbox.empty:
                    self._filled.wait()
                self._gaps.waited(since)
            return self._inbox.next()
