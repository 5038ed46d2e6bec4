"""DiffusionExecutor: the contract between an engine and whatever executes its ticks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import anyio

from steploom.config import EngineConfig
from steploom.errors import EngineDead, EngineError
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest

ProgressCallback = Callable[[str], None]
"""Is told lines about loading, in the engine's event loop."""


class DiffusionExecutor(ABC):
    """Carries the engine's decisions to the workers and brings their answers back.

    Subclass it to execute elsewhere, and give the class (or ``"pkg.module.Class"``) as
    ``EngineConfig.distributed_executor_backend``. All methods run in the event loop that called :meth:`start`. None may
    leave a task behind; :meth:`wait_failed` is awaited by a task of the engine's own.

    Args:
        config: The engine's settings.
        pipeline: A pipeline that the application has (``from_pipeline``); only for execution in this process.
    """

    granularity: ClassVar[Literal["step", "request"]] = "step"
    """``"step"``: the engine sends ticks to :meth:`execute_step`. ``"request"``: it sends whole requests to
    :meth:`execute_model` and nothing else, for systems that batch by themselves."""

    ticks_in_flight: ClassVar[int] = 1
    """``1``: the engine awaits each :meth:`execute_step` before it calls the next. ``2``: it calls the next one while
    one is awaited, and :meth:`amend`. A class that overrides :meth:`execute_step` has 1 unless it says otherwise."""

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that executes whole requests and no ticks need not say its granularity."""
        super().__init_subclass__(**options)
        if "execute_step" in vars(cls) and "ticks_in_flight" not in vars(cls):
            cls.ticks_in_flight = 1
        whole = cls.execute_model is not DiffusionExecutor.execute_model
        if whole and cls.execute_step is DiffusionExecutor.execute_step:
            cls.granularity = "request"

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        self.config = config
        self.pipeline = pipeline

    async def start(self, on_progress: ProgressCallback | None = None) -> PipelineInfo:
        """Brings the workers up.

        Args:
            on_progress: Is told what the workers are doing meanwhile.

        Returns:
            What the loaded pipeline accepts.

        Raises:
            ConfigError: A setting is wrong.
            EngineError: The model cannot be loaded, or not within ``start_timeout_s``. Nothing is left running.
        """
        limit_s = self.config.start_timeout_s
        with anyio.move_on_after(limit_s):
            return await self._init_executor(on_progress or _ignore)
        raise EngineDead(f"start_timeout_s={limit_s}: model={self.config.model!r} was not loaded in time")

    @abstractmethod
    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        """What :meth:`start` does; cleans up after itself if it raises, or is cancelled since it takes too long."""

    @property
    def workers(self) -> int:
        """How many workers it starts with: as many tick at a time, each by itself. 1 unless you say otherwise."""
        return 1

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        """Executes one tick, on worker ``output.worker``.

        Up to ``ticks_in_flight`` may be in flight for each worker; a worker's are answered in order.

        Raises:
            WorkerDied: The worker ended before it answered.
            TickTimeout: It did not answer within ``tick_timeout_s``.
            EngineError: The executor is closed, or the runner itself failed.
        """
        raise EngineError(f"{type(self).__name__} does not execute steps; its granularity is {self.granularity!r}")

    def amend(self, output: SchedulerOutput) -> None:
        """Adds ``output`` to the tick of that number, which waits behind another one; returns at once.

        The answer to that tick says how many amendments were in time (``RunnerOutput.amendments``). Of one that was
        not, those who end are forgotten with the next tick; those who join start with the first one that names them in
        ``scheduled_cached_reqs``. :class:`steploom.worker.agenda.Agenda` does that.

        Raises:
            EngineError: The executor is closed, or has no two ticks in flight.
        """
        raise EngineError(f"{type(self).__name__}: ticks_in_flight={self.ticks_in_flight} needs amend()")

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        """Executes whole requests; one output for each, in their order, ``error`` set where one failed.

        An ``EngineError`` there says that this request is not served (503), and not that the executor is lost. It is
        called concurrently as requests arrive. Cancelling it should cancel them.

        Raises:
            EngineError: The executor cannot serve. If it overrides :meth:`recover`, it is discarded and replaced, as if
                :meth:`wait_failed` had told it, and its requests are replayed; else they fail with this.
        """
        raise EngineError(f"{type(self).__name__} does not execute whole requests; use execute_step")

    async def add_requests(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        """Adds whole requests to those that run and waits for them: :meth:`execute_model`, one call per request."""
        return [output for request in requests for output in await self.execute_model([request])]

    @abstractmethod
    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Calls a method of every worker between two ticks.

        Args:
            method: Its name.
            timeout: Seconds from here until the answer is here. A call that has not begun by then never begins. None: a
                worker may take ``call_timeout_s`` when its turn has come; then it is lost.
            args: Positional arguments.
            kwargs: Keyword arguments.
            unique_reply_rank: Whose answer is wanted; None: a list of all, by rank.

        Raises:
            TimeoutError: ``timeout`` passed.
            TickTimeout: ``call_timeout_s`` passed.
            SteploomError: What the method raised; exceptions that are not of this library become
                :class:`~steploom.errors.GenerationFailed` with their text and traceback.
        """

    async def check_health(self) -> None:
        """Returns if every worker answers between two ticks.

        Raises:
            TickTimeout: One does nothing else, and did not answer within ``tick_timeout_s``: it is lost.
            EngineError: One does not, or is dead.
        """
        await _within(self, "tick_timeout_s", "ping")

    async def sleep(self, level: int = 1, worker: int | None = None) -> None:
        """Frees the devices: weights go to host memory (level 1) or are dropped (level 2).

        With ``worker`` only that of one of several workers, which was replaced while all slept.

        Raises:
            EngineError: A worker cannot, or not within ``start_timeout_s``.
        """
        await _within(self, "start_timeout_s", "sleep", level)

    async def wake_up(self) -> None:
        """Brings the weights back.

        Raises:
            EngineError: A worker cannot, or not within ``start_timeout_s``.
        """
        await _within(self, "start_timeout_s", "wake_up")

    # Of an executor with one worker the engine calls these three without ``worker``, so that it need not know of it.

    async def wait_failed(self, worker: int = 0) -> EngineError:
        """Returns why this worker cannot go on, when that happens; never returns while it can, or if nobody can tell.

        Whoever does not override it says so by what :meth:`execute_step` or :meth:`execute_model` raise.
        """
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    def discard(self, fault: EngineError, worker: int = 0) -> bool:
        """Ends at once the worker that ``fault`` has struck, as :meth:`wait_failed` or a tick has told it.

        Whoever waits for it gets an error. Nothing of what it held is asked for again.

        Returns:
            Whether :meth:`recover` can replace it. If not, as by default, the fault ends the engine.
        """
        return False

    async def recover(self, worker: int = 0) -> None:
        """Replaces the worker that was discarded; returns when it serves as it did when it had started.

        The engine calls it again, after a while, if it raises. It may be cancelled; :meth:`shutdown` follows then.

        Raises:
            EngineError: Not this time.
        """
        raise EngineError(f"{type(self).__name__} has no way to replace its workers")

    async def add_worker(self) -> None:
        """Starts one more worker, whose rank is the next; returns when it serves. Cancelled, it leaves nothing behind.

        Raises:
            EngineError: It cannot be started.
        """
        raise EngineError(f"{type(self).__name__} has no way to add a worker")

    async def remove_worker(self) -> None:
        """Ends the worker of the highest rank, which has nothing to do; bounded in time.

        Raises:
            EngineError: It cannot be ended by itself.
        """
        raise EngineError(f"{type(self).__name__} has no way to remove a worker")

    @abstractmethod
    async def shutdown(self) -> None:
        """Ends the workers, whatever they do, and leaves nothing behind. Idempotent, bounded in time."""


def _ignore(line: str) -> None:
    pass


async def _within(executor: DiffusionExecutor, setting: str, method: str, *args: Any) -> None:
    """Calls a method of every worker, and waits for as long as a setting says.

    It is no method of the executor's: subclasses are other people's, and have names of their own.
    """
    seconds = getattr(executor.config, setting)
    try:
        await executor.collective_rpc(method, timeout=seconds, args=args)
    except TimeoutError:
        raise EngineError(f"a worker did not answer {method}() within {setting}={seconds}") from None
