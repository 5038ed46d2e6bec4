"""check_executor: whether an executor keeps the contract that the engine relies on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

from steploom.config import EngineConfig
from steploom.errors import EngineError
from steploom.executor.abstract import DiffusionExecutor
from steploom.testing import clauses, company, ends, leaving
from steploom.testing.subject import Held, Subject, ended, held, together


async def check_executor(
    kind: type[DiffusionExecutor],
    config: EngineConfig | None = None,
    *,
    prompt: str | list[str] | None = "a red circle",
    lose: Callable[[Any], Awaitable[object] | object] | None = None,
    echo: str | None = None,
    limit_s: float = 60.0,
    **params: Any,
) -> None:
    """Checks that an executor keeps the contract of :class:`~steploom.executor.DiffusionExecutor`.

    It starts the executor two or three times, has it serve, and shuts it down. Without pytest:
    ``asyncio.run(check_executor(MyExecutor))``.

    Args:
        kind: The executor's class.
        config: What it is made with; None takes the defaults.
        prompt: Of the requests.
        lose: Makes the executor of a third life unable to serve, as ``lose(executor)``: kills its worker, say. None
            leaves out the clause ``after the loss``, and of ``wait_failed`` all but that it is silent while there is
            nothing to tell.
        echo: Name of a method for ``collective_rpc`` that returns ``[list(args), kwargs]``. None leaves out the clause
            ``collective_rpc: arguments``.
        limit_s: How long a call may take; a start may take ``start_timeout_s`` more.
        params: Further arguments of the requests; ``num_inference_steps`` is 4 where the pipeline has it.

    Raises:
        AssertionError: It does not; the message names the clause.
    """
    config = dataclasses.replace(config or EngineConfig(), distributed_executor_backend=kind)
    live = partial(Subject, kind, config, prompt, params, limit_s, echo)
    before = await held()
    await _never_started(live())
    await _serves(first := live())
    _compare_first(first, before, await held())
    await _ends(live)
    if lose is not None:
        await _is_lost(live(), lose)


async def _never_started(subject: Subject) -> None:
    with subject.clause("shutdown"):
        await subject.executor.shutdown()


async def _serves(subject: Subject) -> None:
    """Everything that a running executor is asked for. What it says of failing is watched meanwhile."""
    told: list[object] = []
    broken: list[AssertionError] = []

    async def watch() -> None:
        try:
            told.append(await subject.executor.wait_failed())
        except Exception as error:  # noqa: BLE001 - also when it is cancelled at the end
            told.append(error)

    try:
        await subject.start()
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await _all_clauses(subject)
            except AssertionError as error:  # the group would make an ExceptionGroup of it
                broken.append(error)
            group.cancel_scope.cancel()
    finally:
        await subject.shut()
    if broken:
        raise broken[0]
    subject.require(not told, "wait_failed", f"told {told} while the executor served")


async def _all_clauses(subject: Subject) -> None:
    executor = subject.executor
    if executor.granularity == "step":
        two = clauses.OF_TWO_TICKS if executor.ticks_in_flight == 2 else ()
        own = (*clauses.OF_STEPS, company.company_of_steps, leaving.cancelled_tick, *two)
    else:
        own = (*clauses.OF_REQUESTS, company.company_of_requests, leaving.cancelled_requests)
    for clause in (*own, *clauses.OF_ALL, leaving.unwatched):
        await clause(subject)


async def _ends(live: Callable[[], Subject]) -> None:
    """A life that ends while there is work, after one in which everything was imported that is imported but once."""
    before = await held()
    subject = live()
    try:
        await subject.start()
        await ends.recovery(subject)
        await _shut_at_work(subject)
        with subject.clause("shutdown"):
            await subject.executor.shutdown()
        await ends.refusals(subject, "after shutdown")
    finally:
        await subject.shut()
    after = await held()
    if after.threads - before.threads:
        await ended(after.threads - before.threads)
        after = await held()
    _compare(subject, before, after)


async def _shut_at_work(subject: Subject) -> None:
    executor = subject.executor
    if executor.granularity == "step":
        work = partial(executor.execute_step, subject.decide(subject.new()))
    else:
        work = partial(executor.execute_model, [subject.request()])
    with subject.clause("shutdown"):
        answer, *shut = await together(work, executor.shutdown, executor.shutdown)
    for failure in shut:
        subject.require(failure is None, "shutdown", f"it is idempotent, but two at once gave {failure!r}")
    fault = isinstance(answer, Exception) and not isinstance(answer, EngineError)
    subject.require(not fault, "shutdown", f"who waited got {answer!r}, which is neither an answer nor an EngineError")


def _compare_first(subject: Subject, before: Held, after: Held) -> None:
    """Clause ``nothing is left`` of the first life, in which libraries begin threads and sockets of their own."""
    left = after.tasks - before.tasks
    subject.require(not left, "nothing is left", f"tasks that were not there before: {sorted(map(str, left))}")
    files = sorted(after.files - before.files)
    subject.require(not files, "nothing is left", f"files that were not open before: {files}")


def _compare(subject: Subject, before: Held, after: Held) -> None:
    """Clause ``nothing is left``."""
    for kind in ("tasks", "threads", "processes"):
        left = getattr(after, kind) - getattr(before, kind)
        subject.require(not left, "nothing is left", f"{kind} that were not there before: {sorted(map(str, left))}")
    more = after.descriptors - before.descriptors
    subject.require(more <= 0, "nothing is left", f"{more} file descriptors more than before it started")


async def _is_lost(subject: Subject, lose: Callable[[Any], Awaitable[object] | object]) -> None:
    """Clauses ``wait_failed`` and ``after the loss``."""

    async def lose_it() -> None:
        answer = lose(subject.executor)
        if inspect.isawaitable(answer):
            await answer

    try:
        await subject.start()
        with subject.clause("wait_failed"):
            told, failure = await together(subject.executor.wait_failed, lose_it)
        if isinstance(failure, Exception):
            raise failure
        subject.require(isinstance(told, EngineError), "wait_failed", f"it told {told!r}, which is no EngineError")
        await ends.refusals(subject, "after the loss")
        with subject.clause("shutdown"):
            await subject.executor.shutdown()
    finally:
        await subject.shut()
