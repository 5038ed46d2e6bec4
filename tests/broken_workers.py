"""More of the broken executors: with residents, calls, losses and the event loop they do what they must not."""

from __future__ import annotations

import threading

import anyio
from broken_executors import STEPS, Sound, SoundOfRequests

from steploom.errors import EngineNotRunning, WorkerDied


class SoundAnew(Sound):
    """Keeps the contract, and can be replaced."""

    def discard(self, fault):
        self.lost.set()
        return True

    async def recover(self):
        self.lost = anyio.Event()
        self.resident.clear()


class StepsEverybody(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        answer.reports += [self.step(run) for run in list(self.resident) if run not in output.run_ids]
        return answer


class StepsThePausedInSilence(Sound):
    async def execute_step(self, output):
        answer = await super().execute_step(output)
        for run, step in self.resident.items():
            if run not in output.run_ids and step < STEPS - 1:
                self.resident[run] += 1
        return answer


class HangsOnceLost(Sound):
    async def check_later(self):
        if self.lost.is_set():
            await anyio.sleep_forever()


class TicksHangOnceLost(HangsOnceLost):
    async def execute_step(self, output):
        await self.check_later()
        return await super().execute_step(output)


class CallsHangOnceLost(HangsOnceLost):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        await self.check_later()
        return await super().collective_rpc(method, timeout, args, kwargs, unique_reply_rank)


class ServesOnceLost(Sound):
    def check(self):
        if not self.serves:
            raise EngineNotRunning("closed")


class CannotRecover(SoundAnew):
    async def recover(self):
        raise RuntimeError("cannot")


class RecoversNothing(Sound):
    def discard(self, fault):
        return True

    async def recover(self):
        pass


class StaysLost(SoundAnew):
    async def recover(self):
        raise WorkerDied(0, 1)


class RequestsStayLost(SoundOfRequests):
    def discard(self, fault):
        self.lost.set()
        return True

    async def recover(self):
        pass


class BlocksTheLoop(Sound):
    async def execute_step(self, output):
        threading.Event().wait(0.4)
        return await super().execute_step(output)


class RequestsBlockTheLoop(SoundOfRequests):
    async def execute_model(self, requests):
        threading.Event().wait(0.4)
        return await super().execute_model(requests)


class CallsWaitForGenerations(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        with anyio.fail_after(timeout):
            if self.resident:
                await anyio.sleep_forever()
        return await super().collective_rpc(method, timeout, args, kwargs, unique_reply_rank)


class DropsArguments(Sound):
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return await super().collective_rpc(method, timeout, (), None, unique_reply_rank)


BROKEN = {
    "who is left out stands still": [StepsEverybody, StepsThePausedInSilence],
    "collective_rpc: arguments": [DropsArguments],
    "collective_rpc: between two ticks": [CallsWaitForGenerations],
    "the event loop is free": [BlocksTheLoop, RequestsBlockTheLoop],
    "recover": [CannotRecover, RecoversNothing, StaysLost, RequestsStayLost],
    "after the loss": [TicksHangOnceLost, CallsHangOnceLost, ServesOnceLost],
}
