"""MultiprocExecutor: worker processes on this machine, over local sockets."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio
import msgspec
import zmq

from steploom import codec
from steploom.config import EngineConfig
from steploom.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    EngineNotRunning,
    InvalidRequest,
    SteploomError,
)
from steploom.executor.abstract import ProgressCallback
from steploom.executor.channel import MAX_TICKS
from steploom.executor.channels import ChannelExecutor
from steploom.executor.process import WorkerProcess
from steploom.executor.transport import WorkerSocket
from steploom.executor.worker import Worker
from steploom.protocol import ErrorInfo, NewRequest, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput
from steploom.threads import at_once
from steploom.worker.messages import Configure
from steploom.worker.serving import DEFAULT_RUNNER

LONGEST_ADDRESS = 100
"""Bytes of a socket's path that every system takes."""

logger = logging.getLogger("steploom.worker")


class MultiprocExecutor(ChannelExecutor):
    """Executes ticks in a worker process: the event loop never waits for Python code of the device's.

    The process is started as ``python -m steploom.worker``, so a script needs no ``__main__`` guard. It ends when this
    process does, however that ends. What it prints goes to the logger ``steploom.worker`` (INFO), the last lines also
    into :class:`~steploom.errors.WorkerDied`.
    """

    runner: ClassVar[str] = DEFAULT_RUNNER
    """Factory of the workers' runner as ``"pkg.module:name"``; a subclass can put its own here."""

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        if pipeline is not None:
            raise ConfigError("distributed_executor_backend='mp': a pipeline object cannot travel; use 'inproc'")
        Configure.of(config)  # refuses what cannot travel
        self._folder = ""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._workers: list[Worker] = []
        self._closed: anyio.Event | None = None
        self._info: PipelineInfo | None = None  # once it has started
        self._spawned = 0

    @property
    def workers(self) -> int:
        """As many as the settings say."""
        return self.config.data_parallel_size

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        if self._context is not None or self._closed is not None:
            raise EngineNotRunning("an executor starts once; make a new one")
        self._context = zmq.Context()
        await self._prepare(on_progress)
        for rank in range(self.config.data_parallel_size):
            worker = self._made(rank)
            self._workers.append(worker)
            self._channels.append(worker.channel)
            worker.channel.on_progress = on_progress  # from its first line on: what follows takes seconds
        await self._start_all()
        await _import_what_answers_hold()
        ready = await self._ready(on_progress)
        for worker, answer in zip(self._workers, ready, strict=True):
            worker.welcome(tuple(answer.packages))
        self._info = ready[0].info
        return self._info

    async def _start_all(self) -> None:
        """Starts the workers side by side; the first that cannot be started ends the others' starts."""
        if len(self._workers) == 1:  # A task group would wait for the thread that spawns, even if its loop ends.
            await self._workers[0].start()
            return
        faults: list[SteploomError] = []

        async def start(worker: Worker) -> None:
            try:
                await worker.start()
            except SteploomError as error:
                faults.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for worker in self._workers:
                group.start_soon(start, worker)
        if faults:
            raise faults[0]

    async def _prepare(self, on_progress: ProgressCallback) -> None:
        """Makes ready for workers to be made."""

    def _made(self, rank: int) -> Worker:
        """A worker that was not started yet.

        Raises:
            EngineError: The system has no socket for it, or no place for one.
        """
        try:
            return self._make(rank)
        except (OSError, zmq.ZMQError) as error:
            mend = f"look at the limit of open files (ulimit -n), and at TMPDIR ({tempfile.gettempdir()})"
            raise EngineError(f"no socket can be made for worker {rank}: {error}; {mend}") from None

    def _make(self, rank: int) -> Worker:
        """A worker that was not started yet, with an address of its own: nothing for another one arrives here."""
        assert self._context is not None
        self._spawned += 1
        if not (self._folder and _is_private(self._folder)):  # there is none yet, or a cleaner of /tmp has removed it
            self._folder = _private_folder()
            weakref.finalize(self, _remove, self._folder, os.getpid())  # also if nobody calls shutdown
        address = f"{self._folder}/worker-{self._spawned}"
        process = self._process(rank, address, partial(logger.info, "worker %d: %s", rank))
        process.kill_timeout_s = self.config.kill_timeout_s
        process.max_message_bytes = limit = self.config.max_message_bytes
        return Worker(rank, self.config, process, partial(WorkerSocket, self._context, address, limit=limit))

    def _process(self, rank: int, address: str, on_line: Callable[[str], None]) -> WorkerProcess:
        """A process, not started yet, that will connect to ``address``."""
        return WorkerProcess(rank, address, self.runner, on_line)

    def discard(self, fault: EngineError, worker: int = 0) -> bool:
        """Kills the worker; see :meth:`DiffusionExecutor.discard`."""
        if self._info is None or self._closed is not None:
            return False
        self._workers[worker].discard(fault)
        return True

    async def recover(self, worker: int = 0) -> None:
        """Starts a new process in the place of the one that was discarded; see :meth:`DiffusionExecutor.recover`."""
        lost = self._workers[worker]
        if lost.channel.failure is None:
            return
        await lost.process.end(0.0)
        lost.abandon()
        self._workers[worker] = replacement = self._made(worker)
        await self._load(replacement)
        self._channels[worker] = replacement.channel

    async def add_worker(self) -> None:
        """Starts one more process; see :meth:`DiffusionExecutor.add_worker`."""
        self._running()
        worker = self._made(len(self._workers))
        self._workers.append(worker)
        try:
            await self._load(worker)
        except BaseException:
            worker.abandon()
            if self._closed is None:
                self._workers.remove(worker)
            raise
        self._channels.append(worker.channel)

    async def remove_worker(self) -> None:
        """Ends the last process; see :meth:`DiffusionExecutor.remove_worker`."""
        self._running()
        self._channels.pop()
        worker = self._workers[-1]  # shutdown() may come meanwhile, and ends it as well
        try:
            await worker.stop()
        finally:
            worker.abandon()
            if self._closed is None:
                self._workers.remove(worker)

    async def _load(self, worker: Worker) -> None:
        """Starts the process of a worker that joins the others; returns when it has loaded what they have."""
        try:
            with anyio.fail_after(self.config.start_timeout_s):
                await worker.start()
                ready = await worker.channel.ready
            if self._info is None or _portable(ready.info) != _portable(self._info):
                raise EngineDead(f"model={self.config.model!r} is another one than at the start: restart the engine")
        except TimeoutError:
            late = EngineDead(
                f"start_timeout_s={self.config.start_timeout_s}: model={self.config.model!r} was not loaded in time"
            )
            worker.discard(late)
            raise late from None
        except OSError as error:
            worker.discard(EngineDead(str(error)))
            raise EngineError(f"worker {worker.rank} could not be started: {error}") from None
        except BaseException as error:
            worker.discard(EngineDead(str(error)))
            raise
        worker.welcome(tuple(ready.packages))

    ticks_in_flight = MAX_TICKS

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        """Executes one tick; a request that cannot travel fails alone. See :meth:`DiffusionExecutor.execute_step`."""
        try:
            answer = await super().execute_step(output)
        except InvalidRequest:
            fit, refused = self._sort(output)
            answer = await super().execute_step(fit)
            answer.reports.extend(refused)
        answer.reports.extend(self._workers[output.worker].refused.pop(output.tick, ()))
        return answer

    def amend(self, output: SchedulerOutput) -> None:
        """Adds to a tick that is in flight; a request that cannot travel fails with it, alone."""
        try:
            super().amend(output)
        except InvalidRequest:
            fit, refused = self._sort(output)
            super().amend(fit)
            self._workers[output.worker].refused.setdefault(output.tick, []).extend(refused)

    def _sort(self, output: SchedulerOutput) -> tuple[SchedulerOutput, list[RequestReport]]:
        """``output`` with the new requests that can travel, and the failures of the others."""
        fit: list[NewRequest] = []
        refused: list[RequestReport] = []
        room = codec.Room(self.config.max_message_bytes, len(output.scheduled_new_reqs))
        for new in output.scheduled_new_reqs:
            try:
                room.take(codec.encode(new, packages=self._workers[output.worker].socket.packages))
                fit.append(new)
            except InvalidRequest as error:
                refused.append(RequestReport(run_id=new.run_id, phase="done", finished=True, error=ErrorInfo.of(error)))
        return msgspec.structs.replace(output, scheduled_new_reqs=fit), refused

    async def shutdown(self) -> None:
        """Ends the worker, by force if it must; see :meth:`DiffusionExecutor.shutdown`."""
        with anyio.CancelScope(shield=True):
            if self._closed is not None:
                await self._closed.wait()
                return
            self._closed = anyio.Event()
            self._channels = []
            try:
                async with anyio.create_task_group() as group:
                    for worker in self._workers:
                        group.start_soon(worker.stop)
            finally:  # a second Ctrl-C cancels even what is shielded: then by force, and at once
                for worker in self._workers:
                    worker.abandon()
                if self._context is not None:
                    self._context.destroy(linger=0)
                if self._folder:
                    shutil.rmtree(self._folder, ignore_errors=True)
                self._closed.set()


def _portable(info: PipelineInfo) -> PipelineInfo:
    """``info`` without what differs between the workers of a machine."""
    tasks = {task: [_portable(member) for member in members] for task, members in info.tasks.items()}
    return msgspec.structs.replace(info, device="", room_bytes=0, tasks=tasks)


async def _import_what_answers_hold() -> None:
    """Imports what decoding images and tensors needs, while the worker loads its model.

    The import holds Python's lock for tenths of a second at a time: not something to happen with the first image, when
    the event loop serves people.
    """
    for name in ("numpy", "PIL.Image", "torch"):
        if name not in sys.modules:
            await at_once(importlib.import_module, name, abandon_on_cancel=True)


def _private_folder() -> str:
    """A new folder that only this user can enter, with a path that is short enough for sockets, and plain text."""
    folder = tempfile.mkdtemp(prefix="steploom-")
    if folder.isprintable() and len(os.fsencode(folder)) + len("/worker-000000") <= LONGEST_ADDRESS:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="steploom-", dir="/tmp")


def _is_private(folder: str) -> bool:
    """Whether there is such a folder, which only this user can enter."""
    try:
        found = Path(folder).lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _remove(folder: str, process: int) -> None:
    """Removes a folder, but not in a fork of the process that needs it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
