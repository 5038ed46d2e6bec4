"""OperatedEngine: the part of the engine for whoever operates it, and not for those who ask for images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from steploom.config import EngineConfig
from steploom.config.values import is_seconds
from steploom.engine.checks.validation import make_config
from steploom.engine.core import EngineCore
from steploom.engine.costs_file import CostsFile, keep, learned, recall
from steploom.engine.observer import Observers
from steploom.engine.operations import Operations
from steploom.engine.outlast import outlast
from steploom.errors import ConfigError, EngineDead, EngineError
from steploom.executor import resolve_executor
from steploom.executor.abstract import DiffusionExecutor, ProgressCallback


class OperatedEngine:
    """Pause and resume, drain, sleep and wake, more or fewer workers, another model while it serves.

    Attributes:
        config: Settings; those of :meth:`reload`, once it has replaced the model.
        observers: Are told what the engine does.
    """

    config: EngineConfig
    observers: Observers
    _core: EngineCore | None
    _operations: Operations
    _make_executor: Callable[..., DiffusionExecutor]
    _from_pipeline: bool
    _costs_file: CostsFile | None

    def _serving(self) -> EngineCore:
        """The core, if it can serve this caller."""
        raise NotImplementedError

    def _launch(self, core: EngineCore) -> None:
        """Has ``core`` live."""
        raise NotImplementedError

    @property
    def paused(self) -> bool:
        """Whether ticks wait for :meth:`resume`."""
        return self._operations.paused

    @property
    def draining(self) -> bool:
        """Whether requests are refused since :meth:`drain`, until :meth:`resume`."""
        return self._operations.draining

    @property
    def asleep(self) -> bool:
        """Whether requests are refused since :meth:`sleep`, until :meth:`wake_up`."""
        return self._operations.asleep

    async def pause(self) -> None:
        """Stops between two steps; returns when no tick is under way, and none begins until :meth:`resume`.

        Those that run keep their places and latents, new requests are accepted and wait. Time goes on: a ``timeout``
        that passes ends its request, as :meth:`abort` does. A worker that dies meanwhile is replaced. Cancelled before
        it returns, the engine goes on, unless somebody else wants it to pause, too.

        Raises:
            EngineError: The engine cannot serve; or its executor executes whole requests.
        """
        await self._operations.pause(self._serving())

    async def resume(self) -> None:
        """Goes on after :meth:`pause`, and takes requests again after :meth:`drain`; else does nothing.

        Raises:
            EngineError: The engine cannot serve.
        """
        self._serving()
        self._operations.resume()

    async def drain(self, timeout_s: float | None = None) -> int:
        """Refuses new requests, and returns when all that were accepted have ended.

        The refused get :class:`~steploom.errors.EngineNotRunning`, until :meth:`resume`. A paused engine goes on, since
        its requests could not end. Cancelled before it returns, requests are taken again, unless somebody else drains.

        Args:
            timeout_s: Seconds after which those that have not ended get :class:`~steploom.errors.RequestCancelled`;
                0: at once; None: they end by themselves, however long that takes.

        Returns:
            How many got that.

        Raises:
            ConfigError: ``timeout_s`` is no number of seconds.
            EngineError: The engine cannot serve, or was closed meanwhile.
        """
        return await self._operations.drain(self._serving(), _seconds("timeout_s", timeout_s))

    async def sleep(self, level: int = 1) -> None:
        """Moves the weights off the device, once the requests that were accepted are done; new ones are refused.

        Cancelled before the workers were told, the engine takes requests again, unless somebody else has it sleep;
        afterwards it sleeps all the same (:attr:`asleep`).

        Args:
            level: 1 keeps the weights in host memory, 2 drops them.

        Raises:
            EngineError: The engine cannot serve, or the worker cannot do that; or it is paused, reloads or scales.
        """
        await self._operations.fall_asleep(self._serving(), level)

    async def wake_up(self) -> None:
        """Moves the weights back, and takes requests again. Cancelled, it does so all the same.

        Raises:
            EngineError: The engine cannot serve, or a worker is being replaced.
        """
        await self._operations.wake_up(self._serving())

    async def scale(self, workers: int, *, drain_s: float | None = None) -> None:
        """Adds workers, or has those of the highest ranks leave, while it serves.

        Cancelled, or where one cannot be started, it keeps those that there are then.

        Args:
            workers: How many, at least 1.
            drain_s: Seconds after which other workers begin anew what one that leaves still runs; 0: at once; None: it
                ends it, however long that takes. It lets nobody in meanwhile.

        Raises:
            ConfigError: A number is out of range.
            EngineError: The engine cannot serve, sleeps, is paused, or reloads; or it scales already; a worker cannot
                be started; the executor cannot do that.
        """
        if type(workers) is not int or workers < 1:
            raise ConfigError(f"workers={workers!r}: must be an integer, at least 1")
        await self._serving().lanes.scale(workers, _seconds("drain_s", drain_s))

    async def reload(self, on_progress: ProgressCallback | None = None, **overrides: Any) -> None:
        """Replaces the model while requests are served: by other weights, or by another model.

        The new one is loaded beside the old one, which serves until then. From one moment to the next new requests, and
        those that wait, are the new one's; one that does not fit it fails with what :meth:`generate` would have raised.
        Those that run end with the old model, which is there until they have. So for a while there are two models in
        memory. Returns when the old one is gone. If the new one cannot be loaded, or this is cancelled before it is,
        everything is as it was.

        Args:
            on_progress: Is told, line by line, what is being loaded.
            overrides: Fields of :class:`~steploom.EngineConfig` that are to change; none loads the same files anew,
                with as many workers as there are.

        Raises:
            ConfigError: A setting is wrong, or the engine was made from a pipeline object.
            EngineError: The model cannot be loaded; or the engine cannot serve, sleeps, is paused, scales, or reloads
                already.
        """
        old, operations = self._serving(), self._operations
        if self._from_pipeline:
            raise ConfigError("reload(): from_pipeline was given the model; make another engine for another one")
        config = make_config(self.config, _size(old) | overrides)
        operations.check_still("reload()")
        operations.check_open()
        make = self._make_executor
        if "distributed_executor_backend" in overrides:
            make = resolve_executor(config)
        heir = EngineCore(config, make(config), on_progress, self.observers, operations)
        operations.reloading = True
        try:
            file = await self._load(heir, old)
            state, kept_in = learned(old.scheduler), self._costs_file
            self._core, self._costs_file, self.config, self._make_executor = heir, file, config, make
            old.retire(heir)
            await keep(kept_in, state)
            await old.ended.wait()
        finally:
            operations.reloading = False

    async def _load(self, heir: EngineCore, old: EngineCore) -> CostsFile | None:
        """Returns when ``heir`` serves, and where its costs are kept; leaves nothing of it if that cannot be."""
        self._operations.cores.insert(0, heir)  # closing the engine ends it as well
        self._launch(heir)
        try:
            await heir.started.wait()
            heir.check_started()
            assert heir.info is not None
            file = await recall(heir.config, heir.info, heir.scheduler)
            for core in (old, heir):
                core.check_serving()
        except BaseException as error:
            heir.stop()
            await outlast(heir.ended)
            if isinstance(error, EngineDead) and old.serves:  # what is dead is the heir, and not this engine
                raise EngineError(str(error)) from None
            raise
        self._operations.cores.append(self._operations.cores.pop(0))
        return file


def _seconds(name: str, value: float | None) -> float | None:
    """``value``; None for ever.

    Raises:
        ConfigError: It is no number of seconds.
    """
    if value is not None and not (is_seconds(value) and value >= 0):
        raise ConfigError(f"{name}={value!r}: must be a number of seconds, at least 0, or None")
    return None if value is None or math.isinf(value) else value


def _size(core: EngineCore) -> dict[str, Any]:
    """The setting that says how many workers ``core`` has, if that is not what it has started with."""
    workers = len(core.lanes)
    return {} if workers == core.executor.workers else {"data_parallel_size": workers}
