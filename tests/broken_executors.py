"""An executor that keeps the contract with nothing behind it, and others that each break one clause of it."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import msgspec

from steploom.errors import EngineNotRunning, GenerationFailed, WorkerDied
from steploom.executor import DiffusionExecutor
from steploom.protocol import ErrorInfo, PipelineInfo, RequestReport, RunnerOutput
from steploom.requests import DiffusionOutput

STEPS = 3
METHODS = {"ping": "pong"}


class Sound(DiffusionExecutor):
    """Counts steps."""

    def __init__(self, config, pipeline=None) -> None:
        super().__init__(config, pipeline)
        self.resident: dict[str, int] = {}
        self.seeds: dict[str, int] = {}
        self.serves = False
        self.lost = anyio.Event()
        self.busy = anyio.Event()
        self.busy.set()

    async def _init_executor(self, on_progress):
        on_progress("loading nothing")
        self.serves = True
        return PipelineInfo(pipeline_class="Sound")

    def check(self) -> None:
        if not self.serves:
            raise EngineNotRunning("closed")
        if self.lost.is_set():
            raise WorkerDied(0, 1)

    async def execute_step(self, output):
        self.check()
        await anyio.lowlevel.checkpoint()
        for run in output.finished_req_ids:
            self.resident.pop(run, None)
        for new in output.scheduled_new_reqs:
            self.join(new)
        reports = [self.step(run) for run in output.run_ids if run in self.resident]
        return RunnerOutput(tick=output.tick, reports=reports)

    def join(self, new) -> None:
        self.resident[new.run_id], self.seeds[new.run_id] = 0, new.request.seed

    def step(self, run: str) -> RequestReport:
        self.resident[run] += 1
        report = RequestReport(run_id=run, phase="denoise", stepped=True, step=self.resident[run], total_steps=STEPS)
        if report.step == STEPS:
            del self.resident[run]
            report.finished, report.output = True, ("done", self.seeds[run])
        return report

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None) -> Any:
        self.check()
        with anyio.fail_after(timeout):
            await anyio.lowlevel.checkpoint()
        methods = {**METHODS, "echo": [list(args), dict(kwargs or {})]}
        if method not in methods:
            raise GenerationFailed(f"AttributeError: {method}")
        return methods[method] if unique_reply_rank is not None else [methods[method]]

    async def wait_failed(self):
        await self.lost.wait()
        return WorkerDied(0, 1)

    async def shutdown(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.serves = False


class SoundOfRequests(Sound):
    """The same for whole requests."""

    granularity = "request"

    async def execute_model(self, requests):
        self.check()
        await anyio.lowlevel.checkpoint()
        return [self.answer(request) for request in requests]

    def answer(self, request) -> DiffusionOutput:
        if unknown := set(request.params) - {"num_inference_steps"}:
            error = GenerationFailed(f"TypeError: {unknown}")
            return DiffusionOutput(request_id=request.request_id, error=error)
        return DiffusionOutput(request_id=request.request_id, output=SimpleNamespace(images=[], of=request.seed))


class OneStep(Sound):
    ticks_in_flight = 1


class StartsWithNothing(Sound):
    async def _init_executor(self, on_progress):
        return None


class OtherTick(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        answer.tick += output.tick == 3
        return answer


class TwoStepsAtATime(Sound):
    def step(self, run):
        self.resident[run] += 1
        return super().step(run)


class NeverTheSame(Sound):
    count = 0

    def step(self, run):
        report = super().step(run)
        if report.finished:
            self.count += 1
            report.output = ("done", self.count)
        return report


class KnowsEverybody(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        known = {report.run_id for report in answer.reports}
        answer.reports += [RequestReport(run_id=run) for run in output.scheduled_cached_reqs if run not in known]
        return answer


class ChokesOnTheUnknown(Sound):
    async def execute_step(self, output):
        for run in output.finished_req_ids:
            self.resident[run] = self.resident.get(run, 0) if run.startswith("check") else self.resident[run]
        return await super().execute_step(output)


class ForgetsNobody(Sound):
    async def execute_step(self, output):
        output.finished_req_ids.clear()
        return await super().execute_step(output)


class FailsOnCancel(Sound):
    cancelled = False

    async def execute_step(self, output):
        if self.cancelled:
            raise RuntimeError("out of step")
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException:
            self.cancelled = True
            raise
        return await super().execute_step(output)


class OneAnswerForAll(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return await super().collective_rpc(method, timeout, args, kwargs, 0)


class IgnoresTheRank(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return await super().collective_rpc(method, timeout, args, kwargs, None)


class IgnoresTheTimeout(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return await super().collective_rpc(method, None, args, kwargs, unique_reply_rank)


class AnswersEverything(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return await super().collective_rpc("ping", timeout, args, kwargs, unique_reply_rank)


class Unwell(Sound):
    async def check_health(self):
        raise WorkerDied(0, 1)


class CriesWolf(Sound):
    async def wait_failed(self):
        return WorkerDied(0, 1)


class HidesItsLoss(Sound):
    async def wait_failed(self):
        await anyio.sleep_forever()


class ShutsOnce(Sound):
    async def shutdown(self):
        if hasattr(self, "shut"):
            raise RuntimeError("shut already")
        self.shut = True
        await super().shutdown()


class NeverShuts(Sound):
    async def shutdown(self):
        if self.serves:
            await anyio.sleep_forever()


class ServesForEver(Sound):
    async def shutdown(self):
        await anyio.lowlevel.checkpoint()


class LeavesAThread(Sound):
    stop: ClassVar = threading.Event()

    async def _init_executor(self, on_progress):
        threading.Thread(target=self.stop.wait, name="left", daemon=True).start()
        return await super()._init_executor(on_progress)


class LeavesAFile(Sound):
    files: ClassVar[list[Any]] = []

    async def _init_executor(self, on_progress):
        self.files.append(os.fdopen(os.dup(0)))
        return await super()._init_executor(on_progress)


class AnswersLate(Sound):
    """Has two ticks in flight, and answers the second one first."""

    ticks_in_flight = 2
    amended = False

    async def execute_step(self, output):
        answer = await super().execute_step(output)
        if output.scheduled_new_reqs and self.ticks_in_flight == 2:
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
        return answer

    def amend(self, output):
        for new in output.scheduled_new_reqs:
            self.join(new)


class RaisesFailures(SoundOfRequests):
    async def execute_model(self, requests):
        outputs = await super().execute_model(requests)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs


class NeverTheSameAgain(SoundOfRequests):
    count = 0

    def answer(self, request):
        output = super().answer(request)
        self.count += 1
        return output if output.error else msgspec.structs.replace(output, output=("done", self.count))


class AnswersInReverse(SoundOfRequests):
    async def add_requests(self, requests):
        return (await super().add_requests(requests))[::-1]


class LosesRequests(SoundOfRequests):
    async def execute_model(self, requests):
        return (await super().execute_model(requests))[1:]


class EmptyAnswers(SoundOfRequests):
    def answer(self, request):
        return DiffusionOutput(request_id=request.request_id)


class NoErrorClass(SoundOfRequests):
    def answer(self, request):
        output = super().answer(request)
        return (
            output if output.error is None else DiffusionOutput(request_id=request.request_id, error=ErrorInfo("", ""))
        )


BROKEN = {
    "start": [StartsWithNothing],
    "ticks": [OtherTick, TwoStepsAtATime],
    "ticks in flight": [AnswersLate],
    "same request, same output": [NeverTheSame, NeverTheSameAgain],
    "unknown ids are ignored": [KnowsEverybody, ChokesOnTheUnknown],
    "finished ids are forgotten": [ForgetsNobody],
    "cancellation": [FailsOnCancel],
    "collective_rpc": [OneAnswerForAll, AnswersEverything],
    "collective_rpc: unique_reply_rank": [IgnoresTheRank],
    "collective_rpc: timeout": [IgnoresTheTimeout],
    "check_health": [Unwell],
    "wait_failed": [CriesWolf, HidesItsLoss],
    "shutdown": [ShutsOnce, NeverShuts],
    "after shutdown": [ServesForEver],
    "nothing is left": [LeavesAThread, LeavesAFile],
    "whole requests": [AnswersInReverse, LosesRequests, EmptyAnswers],
    "failures are outputs": [RaisesFailures, NoErrorClass],
}
