"""WholeRequests: an executor that only knows whole requests, seen as one that executes ticks.

So there is one tick loop. A tick starts a call of ``execute_model`` for every request that joins, cancels the calls of
those that the scheduler ended, and answers as soon as there is something to say. An ``EngineError`` out of such a call
is the tick's, if the executor can be replaced: then all are replayed. If it cannot be, it is that request's, as one in
an output's ``error`` is: who answers is not lost.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import cast

import anyio
import anyio.abc
import anyio.lowlevel

from steploom.engine.asked import asked
from steploom.errors import EngineError
from steploom.executor.abstract import DiffusionExecutor
from steploom.protocol import ErrorInfo, NewRequest, RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest

_TOLD = ("output", "frame_rate", "sampling_rate", "texts", "trajectory_latents", "trajectory_timesteps",
         "generator_states")  # fmt: skip
"""What an executor's output and a worker's report of a finished request have in common."""


class WholeRequests:
    """Executes ticks by running whole requests in ``group``, one call of ``execute_model`` each.

    Args:
        executor: Executor of granularity ``"request"``.
        group: Task group that owns the calls.
    """

    def __init__(self, executor: DiffusionExecutor, group: anyio.abc.TaskGroup) -> None:
        self._executor = executor
        self._replaceable = type(executor).recover is not DiffusionExecutor.recover
        self._fault: EngineError | None = None
        self._group = group
        self._calls: dict[str, anyio.CancelScope] = {}
        self._done: dict[str, RequestReport] = {}
        self._changed = anyio.Event()
        self._passes = 0

    def poke(self) -> None:
        """There is something new to schedule: the tick that waits, if any, returns."""
        self._changed.set()

    def forget(self) -> None:
        """Whoever was to execute them is gone: ends all calls."""
        calls, self._calls, self._done, self._fault = self._calls, {}, {}, None
        for scope in calls.values():
            scope.cancel()

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        """Starts and cancels what ``output`` says; answers when a request is done or there is more to schedule.

        Raises:
            EngineError: A call raised it, and the executor can be replaced.
        """
        for run in output.finished_req_ids:
            self._done.pop(run, None)
            if run in self._calls:
                self._calls.pop(run).cancel()
        for new in output.scheduled_new_reqs:
            self._calls[new.run_id] = scope = anyio.CancelScope()
            self._group.start_soon(self._call, new, scope)
        await self._wait(bool(output.scheduled_new_reqs))
        if self._fault is not None:
            raise self._fault
        done, self._done = self._done, {}
        running = [RequestReport(run_id=run, phase="denoise") for run in self._calls]
        return RunnerOutput(tick=output.tick, reports=[*done.values(), *running])

    async def _wait(self, admitted: bool) -> None:
        """Returns at the next change; and after a change often enough for every batch key to have its turn.

        A scheduler fills a tick from one batch key. Were a tick to wait for a request of one key, requests of another
        key could not join meanwhile, although there is room.
        """
        if admitted or self._changed.is_set():
            self._passes = len(self._calls) + 1
        if self._passes > 0 or not self._calls:
            self._passes -= 1
            await anyio.lowlevel.checkpoint()
        else:
            await self._changed.wait()
            self._passes = len(self._calls) + 1
        self._changed = anyio.Event()

    async def _call(self, new: NewRequest, scope: anyio.CancelScope) -> None:
        """One request from start to end; its report is left in ``_done`` unless it was cancelled."""
        with scope:
            report = RequestReport(run_id=new.run_id, phase="done", finished=True)
            try:
                answer = await self._ask(new.request)
            except Exception as error:  # noqa: BLE001 - the request's boundary: reported as its failure
                _fail(report, error, "".join(traceback.format_exception(error)))
                if isinstance(error, EngineError) and self._replaceable and new.run_id in self._calls:
                    self._fault = error
            else:
                for name in _TOLD:
                    setattr(report, name, getattr(answer, name))
                if answer.error is not None:
                    _fail(report, answer.error)
            if self._calls.pop(new.run_id, None) is not None:
                self._done[new.run_id] = report
                self._changed.set()

    async def _ask(self, request: DiffusionRequest) -> DiffusionOutput:
        """What the executor makes of a request.

        Raises:
            TypeError: It answers something else than one output.
            ValueError: It answers that of another request, or nothing.
        """
        call = f"{type(self._executor).__name__}.execute_model()"
        given = cast("object", await asked(self._executor.execute_model, [request]))
        kind = type(given).__name__
        answers = list(cast("Iterable[object]", given)) if isinstance(given, Iterable) else None
        answer = answers[0] if answers is not None and len(answers) == 1 else None
        if not isinstance(answer, DiffusionOutput):
            what = f" of {[type(one).__name__ for one in answers]}" if answers is not None else ""
            mend = "must be a list of one DiffusionOutput for the one request"
            raise TypeError(f"{call} answered a {kind}{what}: {mend}")
        if answer.request_id != request.request_id:
            raise ValueError(
                f"{call} answered request {answer.request_id!r}, where it was asked {request.request_id!r}"
            )
        error = cast("object", answer.error)
        if error is not None and not isinstance(error, Exception):
            raise TypeError(f"{call} answered error={error!r}: must be an exception of steploom.errors, or None")
        if error is None and answer.output is None:
            raise ValueError(f"{call} answered neither an output nor an error")
        return answer


def _fail(report: RequestReport, error: Exception, told: str = "") -> None:
    report.error = ErrorInfo.of(error, told)
    report.unserved = isinstance(error, EngineError)
