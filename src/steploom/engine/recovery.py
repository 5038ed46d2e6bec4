"""Recovery: from the fault of a worker to the next tick."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import anyio

from steploom.config import EngineConfig
from steploom.engine.observer import Observers
from steploom.errors import EngineDead, EngineError, SteploomError, WorkerDied
from steploom.executor.abstract import DiffusionExecutor

LONGEST_BACKOFF_S = 30.0
"""The longest wait before a worker is started again."""

log = logging.getLogger("steploom.engine")


class Recovery:
    """Has an executor replace workers: the first time at once, then after waits that double until a tick is answered.

    Args:
        executor: Whose workers.
        config: ``restart_backoff_s`` is the first wait; ``max_retries`` says how many starts in a row may fail.
        observers: Are told.

    Attributes:
        fault: What the engine is recovering from; None while the workers serve.
    """

    def __init__(self, executor: DiffusionExecutor, config: EngineConfig, observers: Observers) -> None:
        self._executor = executor
        self._config = config
        self._observers = observers
        self.fault: EngineError | None = None
        self._starts = 0  # since a tick was answered

    def begin(self, fault: EngineError) -> bool:
        """Gives up the workers that a fault has struck; whether they can be replaced."""
        if not self._executor.discard(fault):
            return False
        self.fault = fault
        self._observers.on_fault(fault)
        return True

    def check(self) -> None:
        """Raises:
        EngineError: The workers are being replaced; says why.
        """
        if self.fault is not None:
            raise EngineError(f"the worker is being replaced, try again later; it was lost: {self.fault}")

    def fruitful(self) -> None:
        """A tick was answered."""
        self._starts = 0

    async def run(self, resume: Callable[[], Awaitable[object]]) -> None:
        """Returns when the workers serve again.

        Args:
            resume: Brings a worker that was just started to where the lost one was.

        Raises:
            EngineDead: ``max_retries`` times they could not be started again; says why.
        """
        assert self.fault is not None
        began, failures = time.monotonic(), 0
        while True:
            await anyio.sleep(self._backoff_s())
            self._starts += 1
            try:
                await self._executor.recover()
                await resume()
                break
            except (SteploomError, OSError) as error:
                failures += 1
                self._check(failures, error)
        self.fault = None
        took = time.monotonic() - began
        log.warning("the worker was replaced, which took %.1f s", took)
        self._observers.on_recovered(took)

    def _backoff_s(self) -> float:
        if not self._starts:
            return 0.0
        return min(self._config.restart_backoff_s * 2 ** min(self._starts - 1, 32), LONGEST_BACKOFF_S)

    def _check(self, failures: int, error: Exception) -> None:
        """Gives up after too many failed starts."""
        if isinstance(error, EngineError):
            self._executor.discard(error)
        if failures > self._config.max_retries:
            times = "once" if failures == 1 else f"{failures} times"
            raise EngineDead(
                f"the worker could not be started again, tried {times} (max_retries={self._config.max_retries}): "
                f"{error}; it was lost: {self.fault}"
            ) from None
        log.warning("the worker could not be started again: %s", error)


def cause(fault: EngineError) -> str:
    """What a worker died of, in one line, without what it printed."""
    if isinstance(fault, WorkerDied):
        return f"worker {fault.rank} died with exit code {fault.exitcode}"
    return str(fault).partition("\n")[0][:300]
