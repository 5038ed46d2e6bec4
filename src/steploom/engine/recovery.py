"""Recovery: from the fault of a worker to the next tick."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Awaitable, Callable

import anyio

from steploom.config import EngineConfig
from steploom.engine.asked import asked, called
from steploom.engine.mailbox import fresh
from steploom.engine.observer import Observers
from steploom.errors import EngineDead, EngineError, SteploomError, WorkerDied, words_of
from steploom.executor.abstract import DiffusionExecutor

log = logging.getLogger("steploom.engine")


class Recovery:
    """Has an executor replace a worker: the first time at once, then after waits that double until a tick is answered.

    Args:
        executor: Whose worker.
        config: ``restart_backoff_s`` is the first wait, ``max_restart_backoff_s`` the longest; ``max_retries``
            says how many starts in a row may fail.
        observers: Are told.
        worker: Its rank.
        on_hopeless: Is told once more starts in a row have failed than may; it is tried on while others can serve.
        others: Whether other workers serve, or may be replaced yet.

    Attributes:
        fault: What the worker was lost by; None while it serves.
        hopeless: Whether more starts in a row have failed than may.
    """

    def __init__(
        self,
        executor: DiffusionExecutor,
        config: EngineConfig,
        observers: Observers,
        worker: int = 0,
        on_hopeless: Callable[[], None] = lambda: None,
        others: Callable[[], bool] = lambda: False,
    ) -> None:
        self._executor = executor
        self._config = config
        self._observers = observers
        self._which = (worker,) if worker else ()  # executors of one worker need not know that there may be more
        self._on_hopeless = on_hopeless
        self._others = others
        self.fault: EngineError | None = None
        self.hopeless = False
        self._starts = 0  # since a tick was answered

    def begin(self, fault: EngineError) -> bool:
        """Gives up the worker that a fault has struck; whether it can be replaced."""
        if not called(self._executor.discard, fault, *self._which):
            return False
        self.fault = fault
        self._observers.on_fault(fault)
        return True

    def check(self) -> None:
        """Raises:
        EngineError: The worker is being replaced; says why.
        """
        if self.fault is not None:
            raise EngineError(f"the worker is being replaced, try again later; it was lost: {self.fault}")

    def fruitful(self) -> None:
        """A tick was answered."""
        self._starts = 0

    async def run(self, resume: Callable[[], Awaitable[object]]) -> None:
        """Returns when the worker serves again.

        Args:
            resume: Brings a worker that was just started to where the lost one was.

        Raises:
            EngineDead: It could not be started again more than ``max_retries`` times, and there is no other worker.
        """
        assert self.fault is not None
        began, failures = time.monotonic(), 0
        while True:
            await anyio.sleep(self._backoff_s())
            self._starts += 1
            try:
                await asked(self._executor.recover, *self._which)
                await resume()
                break
            except (SteploomError, OSError) as error:
                failures += 1
                self._check(failures, error)
        self.fault, self.hopeless = None, False
        took = time.monotonic() - began
        log.warning("the worker was replaced, which took %.1f s", took)
        self._observers.on_recovered(took)

    def _backoff_s(self) -> float:
        if not self._starts:
            return 0.0
        wait_s = self._config.restart_backoff_s * 2 ** min(self._starts - 1, 32)
        return min(wait_s, self._config.max_restart_backoff_s)

    def _check(self, failures: int, error: Exception) -> None:
        """Gives up after too many failed starts."""
        if isinstance(error, EngineError):
            called(self._executor.discard, error, *self._which)
        if failures > self._config.max_retries and not self.hopeless:
            self.hopeless = True
            self._on_hopeless()
        if self.hopeless and not self._others():
            times = "once" if failures == 1 else f"{failures} times"
            raise EngineDead(
                f"the worker could not be started again, tried {times} (max_retries={self._config.max_retries}): "
                f"{error}; it was lost: {self.fault}"
            ) from None
        log.warning("the worker could not be started again: %s", error)


def cause(fault: EngineError) -> str:
    """What a worker died of, in one line, without what it printed."""
    if isinstance(fault, WorkerDied):
        return fault.cause
    return str(fault).partition("\n")[0][:300]


def failure(error: Exception) -> SteploomError:
    """What an engine is dead of that ``error`` ends; one that says nothing is told by where it was raised."""
    if isinstance(error, SteploomError):
        return fresh(error)  # Without its traceback, whose frames may hold tensors.
    where = traceback.extract_tb(error.__traceback__)[-1:]
    said = words_of(error) or " ".join(f"raised at {frame.filename}:{frame.lineno}, in {frame.name}" for frame in where)
    dead = EngineDead(f"{type(error).__name__}: {said}")
    dead.add_note("".join(traceback.format_exception(error)))
    return dead
