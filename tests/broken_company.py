"""More of the broken executors: they mix up whoever is there at the same time, and do not let go of who leaves."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import msgspec
from broken_executors import AnswersLate, LeavesAFile, Sound, SoundOfRequests

from steploom.errors import EngineDead, GenerationFailed


class MixesRequests(SoundOfRequests):
    """Answers each request with the output of the one before."""

    last: Any = None

    def answer(self, request):
        output = super().answer(request)
        if output.error is not None:
            return output
        mine = output.output
        output, self.last = msgspec.structs.replace(output, output=self.last or mine), mine
        return output


class MixesConcurrentRequests(SoundOfRequests):
    """Gives whoever asks while others wait the output of the last to ask."""

    async def execute_model(self, requests):
        self.latest = requests
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        outputs = zip(await super().execute_model(requests), await super().execute_model(self.latest), strict=True)
        return [mine if mine.error else msgspec.structs.replace(mine, output=its.output) for mine, its in outputs]


class MixesMates(Sound):
    """Gives the first of those that end in a tick the output of the last."""

    async def execute_step(self, output):
        answer = await super().execute_step(output)
        done = [report for report in answer.reports if report.finished]
        for report, given in zip(done, [report.output for report in reversed(done)], strict=True):
            report.output = given
        return answer


class DropsMate(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        del answer.reports[2:]
        return answer


class DropsUnderLoad(SoundOfRequests):
    under_way = 0

    async def execute_model(self, requests):
        self.under_way += 1
        try:
            await anyio.sleep(0.01)
            if self.under_way > 2:
                await anyio.sleep_forever()
            return await super().execute_model(requests)
        finally:
            self.under_way -= 1


class ReportsTwiceFinished(Sound):
    before: ClassVar[list[Any]] = []

    async def execute_step(self, output):
        answer = await super().execute_step(output)
        again, self.before = self.before, [report for report in answer.reports if report.finished]
        answer.reports += again
        return answer


class WrongSeedTold(SoundOfRequests):
    def answer(self, request):
        return msgspec.structs.replace(super().answer(request), seed=12345)


class WrongAmendCount(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        answer.amendments = 7
        return answer


class SaysThatAmendmentsAreLate(AnswersLate):
    """And has them step all the same."""

    ticks_in_flight = 2

    async def execute_step(self, output):
        for _ in range(0 if output.run_ids else 5):
            await anyio.lowlevel.checkpoint()
        answer = await Sound.execute_step(self, output)
        if not output.run_ids:
            answer.reports += [self.step(run) for run, step in list(self.resident.items()) if step == 0]
        return answer


class StepsAfterAll(Sound):
    def step(self, run):
        report = super().step(run)
        report.total_steps = 1
        return report


class SwallowsCancel(SoundOfRequests):
    async def execute_model(self, requests):
        with contextlib.suppress(BaseException):
            await anyio.sleep(0.2)
        return await super().execute_model(requests)


class TicksSwallowCancel(Sound):
    async def execute_step(self, output):
        with contextlib.suppress(BaseException):
            await anyio.sleep(0.02)
        return await super().execute_step(output)


class FailsWhenLeft(SoundOfRequests):
    """Once it has begun."""

    async def execute_model(self, requests):
        await anyio.lowlevel.checkpoint()
        try:
            await anyio.sleep(0.02)
        except anyio.get_cancelled_exc_class():
            raise UnboundLocalError("task") from None
        return await super().execute_model(requests)


class TicksEndWithAnotherCancel(Sound):
    """A new ``CancelledError`` takes the place of the one that was sent."""

    async def execute_step(self, output):
        with anyio.move_on_after(0.02) as scope, contextlib.suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        if not scope.cancel_called:
            raise asyncio.CancelledError
        return await super().execute_step(output)


class LateCallsAreCancelled(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        answer = await super().collective_rpc(method, timeout, args, kwargs, unique_reply_rank)
        if timeout is not None and timeout < 0.005:
            raise asyncio.CancelledError
        return answer


class WatchFails(Sound):
    async def wait_failed(self):
        try:
            return await super().wait_failed()
        except anyio.get_cancelled_exc_class():
            raise UnboundLocalError("task") from None


class WatchEndsWithAnotherCancel(Sound):
    async def wait_failed(self):
        with contextlib.suppress(anyio.get_cancelled_exc_class()):
            return await super().wait_failed()
        raise asyncio.CancelledError


class LeavesAFileOnce(LeavesAFile):
    """In its first life."""

    async def _init_executor(self, on_progress):
        if self.files:
            return await Sound._init_executor(self, on_progress)
        self.files.append(Path(__file__).open())  # noqa: ASYNC230, SIM115
        return await Sound._init_executor(self, on_progress)


class DeadOfAnUnknownMethod(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        try:
            return await super().collective_rpc(method, timeout, args, kwargs, unique_reply_rank)
        except GenerationFailed as error:
            raise EngineDead(str(error)) from None


BROKEN = {
    "ticks": [ReportsTwiceFinished, WrongAmendCount, SaysThatAmendmentsAreLate, StepsAfterAll, DropsMate],
    "whole requests": [WrongSeedTold],
    "same request, same output": [MixesRequests],
    "in company": [MixesMates, MixesConcurrentRequests, DropsUnderLoad],
    "cancellation": [SwallowsCancel, TicksSwallowCancel, FailsWhenLeft, TicksEndWithAnotherCancel],
    "collective_rpc": [DeadOfAnUnknownMethod],
    "collective_rpc: timeout": [LateCallsAreCancelled],
    "wait_failed": [WatchFails, WatchEndsWithAnotherCancel],
    "nothing is left": [LeavesAFileOnce],
}
