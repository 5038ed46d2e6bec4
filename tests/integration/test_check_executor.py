"""steploom.testing.check_executor: sound executors pass, and each broken one fails with the clause that it breaks."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from broken_company import BROKEN as BROKEN_IN_COMPANY
from broken_executors import BROKEN, LeavesAFile, LeavesAThread, Sound, SoundOfRequests
from broken_workers import BROKEN as BROKEN_TOO
from broken_workers import SoundAnew

from steploom.config import EngineConfig
from steploom.executor import DiffusionExecutor, InprocExecutor, MultiprocExecutor
from steploom.testing import check_executor
from steploom.testing.engines import _FakeExecutor, _Gate

HANGS = (
    "NeverShuts",
    "HidesItsLoss",
    "TicksHangOnceLost",
    "CallsHangOnceLost",
    "CallsWaitForGenerations",
    "DropsUnderLoad",
)


def lose(executor: Any) -> None:
    executor.lost.set()


LONG = frozenset({
    "BlocksTheLoop", "LeavesAThread", "SwallowsCancel", "RequestsBlockTheLoop", "TicksHangOnceLost", "NeverShuts",
    "CallsHangOnceLost", "HidesItsLoss", "ServesOnceLost", "TicksEndWithAnotherCancel", "CannotRecover",
    "RequestsStayLost", "RecoversNothing", "StaysLost", "ShutsOnce", "ServesForEver",
})  # fmt: skip
"""Those that take a second and more to be found out."""


def marks(kind: type, *, first: bool) -> list[pytest.MarkDecorator]:
    """The fast path has the first one of each clause of the first list, unless it is a long one."""
    return [] if first and kind.__name__ not in LONG else [pytest.mark.slow]


@pytest.mark.parametrize(
    "kind", [Sound, *(pytest.param(one, marks=pytest.mark.slow) for one in (SoundOfRequests, SoundAnew))]
)
async def test_a_sound_executor_passes(kind: type[DiffusionExecutor]) -> None:
    await check_executor(kind, lose=lose, echo="echo")


@pytest.mark.slow
def test_it_needs_no_pytest() -> None:
    asyncio.run(check_executor(Sound))


@pytest.mark.parametrize(
    ("clause", "kind"),
    [
        pytest.param(clause, kind, id=kind.__name__, marks=marks(kind, first=broken is BROKEN and kind is kinds[0]))
        for broken in (BROKEN, BROKEN_TOO, BROKEN_IN_COMPANY)
        for clause, kinds in broken.items()
        for kind in kinds
    ],
)
async def test_a_broken_one_fails_with_its_clause(clause: str, kind: type[DiffusionExecutor]) -> None:
    limit_s = 0.2 if kind.__name__ in HANGS else 60.0
    LeavesAThread.stop.clear()
    try:
        with pytest.raises(AssertionError) as caught:
            await check_executor(kind, lose=lose, echo="echo", limit_s=limit_s)
    finally:
        LeavesAThread.stop.set()
        while LeavesAFile.files:
            LeavesAFile.files.pop().close()
    assert f"{kind.__name__} breaks the contract of executors, clause {clause!r}: " in str(caught.value)


class Pretended(_FakeExecutor):
    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, _Gate())


@pytest.mark.slow
async def test_the_pretended_one_keeps_the_contract() -> None:
    await check_executor(Pretended, lose=lambda executor: executor._gate.die())


@pytest.mark.slow
async def test_the_thread_keeps_the_contract() -> None:
    await check_executor(InprocExecutor)


@pytest.mark.slow
async def test_the_process_keeps_the_contract() -> None:
    async def kill(executor: Any) -> None:
        os.kill(await executor.collective_rpc("pid", unique_reply_rank=0), signal.SIGKILL)

    await check_executor(MultiprocExecutor, EngineConfig(worker_extension="worker_pid.Pid"), lose=kill, echo="echo")
