"""The clauses of the contract, each checked on a running executor."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from steploom.errors import EngineError, RequestError, SteploomError
from steploom.protocol import SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.testing.subject import Call, Subject, together

UNKNOWN = "steploom_no_such_thing"
"""Name of a method, and of an argument, that nobody has."""
SLACK_S = 5.0
"""How much later than its timeout a call may end on a machine that has other things to do."""
PAUSES = 3
"""How often a resident is left out of a tick; how often it is looked whether the event loop is free."""
BLOCKED_S = 0.25
"""How long the event loop may be blocked at a stretch."""
BEAT_S = 0.01
"""How often it is looked."""
SHORT_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02)
"""Timeouts that pass before the answer, with it, or behind it."""


async def ticks(subject: Subject) -> None:
    """Requests run to their end; one joins while another is there."""
    early, late = subject.new(), subject.new()
    reports = await subject.tick(early)
    reports |= await subject.tick(late, cached=[] if _finished(reports, early.run_id) else [early.run_id])
    await subject.finish([early.run_id, late.run_id], reports)


def _finished(reports: Any, run: str) -> bool:
    return run in reports and reports[run].finished


async def left_out(subject: Subject) -> None:
    """A resident that a tick does not name stands still: it is paused."""
    clause, new = "who is left out stands still", subject.new()
    run, reports = new.run_id, await subject.tick(new)
    for _ in range(PAUSES):
        if run not in reports or _finished(reports, run):
            break
        before = reports[run].step
        for named in (False, True):
            with subject.clause(clause):
                result = await subject.executor.execute_step(output := subject.decide(cached=[run] if named else []))
            found = {report.run_id: report.step for report in result.reports}
            told = f"{run} was {'' if named else 'not '}in the tick, and the reports are of {sorted(found)}"
            subject.require((run in found) is named, clause, told)
        steps = found[run] - before
        subject.require(steps <= 1, clause, f"{run} advanced by {steps} steps in a tick without it, and one with it")
        reports = subject.take(output, result)
    await subject.finish([run], reports)


async def unknown_ids(subject: Subject) -> None:
    """What the worker does not hold is ignored."""
    for cached, ended in (([UNKNOWN + "#0"], []), ([], [UNKNOWN + "#1"])):
        with subject.clause("unknown ids are ignored"):
            reports = await subject.executor.execute_step(output := subject.decide(cached=cached, ended=ended))
        found = set(subject.take(output, reports)) & {*cached, *ended}
        subject.require(not found, "unknown ids are ignored", f"reported on {sorted(found)}, which nobody has sent")


async def finished_ids(subject: Subject) -> None:
    """Who was ended is forgotten; its mate goes on."""
    clause = "finished ids are forgotten"
    gone, mate = subject.new(), subject.new()
    reports = await subject.tick(gone, mate)
    going_on = [] if _finished(reports, mate.run_id) else [mate.run_id]
    reports |= (later := await subject.tick(cached=going_on, ended=[gone.run_id]))
    subject.require(gone.run_id not in later, clause, f"reported on {gone.run_id} in the tick that ended it")
    going_on = [] if _finished(reports, mate.run_id) else [mate.run_id]
    reports |= (later := await subject.tick(cached=[*going_on, gone.run_id]))
    subject.require(gone.run_id not in later, clause, f"still holds {gone.run_id}, a tick after it was ended")
    await subject.finish([mate.run_id], reports)


async def in_flight(subject: Subject) -> None:
    """Two ticks at a time are answered in order, and what is added to the second one starts."""
    clause = "ticks in flight"
    executor, first, second = subject.executor, subject.new(), subject.new()
    one, two = subject.decide(first), subject.decide()
    amendment = SchedulerOutput(two.tick, [second])
    order: list[int] = []

    async def execute(output: SchedulerOutput) -> Any:
        result = await executor.execute_step(output)
        order.append(output.tick)
        return result

    async def amend() -> None:
        executor.amend(amendment)

    with subject.clause(clause, subject.config.tick_timeout_s + subject.limit_s):
        results = await together(partial(execute, one), partial(execute, two), amend)
    for result in results:
        if isinstance(result, Exception):
            subject.broken(clause, f"raised {type(result).__name__}: {result}")
    subject.require(order == [one.tick, two.tick], clause, f"two ticks in flight were answered in the order {order}")
    reports = subject.take(one, results[0]) | subject.take(two, results[1], amendment)
    await subject.finish([first.run_id, second.run_id], reports)


async def whole_requests(subject: Subject) -> None:
    """One output for each request, in their order; failures are outputs with an error."""
    clause, executor = "whole requests", subject.executor
    asked = [subject.request(), subject.request(), subject.request()]
    calls = [partial(executor.execute_model, asked[:1]), partial(executor.add_requests, asked[1:])]
    with subject.clause(clause):
        answers = await together(*calls)
    outputs: list[Any] = []
    for answer in answers:
        if isinstance(answer, Exception):
            subject.broken(clause, f"raised {type(answer).__name__}: {answer}; a failure is an output with its error")
        subject.require(isinstance(answer, list), clause, f"answered {answer!r}, no list of outputs")
        outputs += answer
    _check_outputs(subject, outputs, asked)
    for output in outputs:
        subject.require(output.error is None, clause, f"a request failed: {output.error}; give params that it takes")
        subject.require(output.output is not None, clause, "an output without error has no output")


def _check_outputs(subject: Subject, outputs: list[Any], asked: list[DiffusionRequest]) -> None:
    for output in outputs:
        subject.require(isinstance(output, DiffusionOutput), "whole requests", f"{output!r} is no DiffusionOutput")
    found, ids = [output.request_id for output in outputs], [request.request_id for request in asked]
    subject.require(found == ids, "whole requests", f"the outputs of {ids} came as {found}")
    for output, request in zip(outputs, asked, strict=True):
        told = output.seed in (None, request.seed)
        subject.require(told, "whole requests", f"the output of seed {request.seed} says that it is of {output.seed}")


async def failures(subject: Subject) -> None:
    """A request that cannot succeed is an output with an error; whoever ignores what it does not know may make it."""
    clause, bad = "failures are outputs", subject.request(**{UNKNOWN: 1})
    with subject.clause(clause):
        outputs = await subject.executor.execute_model([bad])
    _check_outputs(subject, outputs, [bad])
    (output,) = outputs
    error: Any = output.error
    told = output.output is not None if error is None else isinstance(error, RequestError)
    subject.require(told, clause, f"a failed request needs a RequestError as its error, but has {error!r}")


async def calls(subject: Subject) -> None:
    """collective_rpc answers for all workers, or for one; what a method raises comes back."""
    clause, rpc = "collective_rpc", subject.executor.collective_rpc
    with subject.clause(clause):
        everybody = await rpc("ping", timeout=subject.limit_s)
        first = await rpc("ping", timeout=subject.limit_s, unique_reply_rank=0)
    subject.require(isinstance(everybody, list), clause, f"without unique_reply_rank it is a list, not {everybody!r}")
    workers: list[Any] = everybody
    told = f"unique_reply_rank=0 is {first!r}, but the list of all begins with {workers[:1]!r}"
    subject.require(workers[:1] == [first], "collective_rpc: unique_reply_rank", told)
    with subject.clause(clause):
        (answer,) = await together(partial(rpc, UNKNOWN, timeout=subject.limit_s))
    told = f"a method that nobody has gave {answer!r}, and no SteploomError of the caller's own fault"
    subject.require(isinstance(answer, SteploomError) and not isinstance(answer, EngineError), clause, told)


async def arguments(subject: Subject) -> None:
    """What a call is given arrives, where a method is known that tells."""
    clause = "collective_rpc: arguments"
    if subject.echo is None:
        return
    args, kwargs = [1, "two"], {"three": 3.0}
    with subject.clause(clause):
        answer = await subject.executor.collective_rpc(subject.echo, None, args, kwargs, 0)
    subject.require(
        answer == [args, kwargs], clause, f"{subject.echo} was given {[args, kwargs]!r}, and got {answer!r}"
    )


async def among_residents(subject: Subject) -> None:
    """A call does not wait until nobody is resident any more, only for the tick that runs."""
    if subject.executor.granularity == "request":
        return
    new = subject.new()
    await subject.tick(new)
    with subject.clause("collective_rpc: between two ticks"):
        await subject.executor.collective_rpc("ping")
    await subject.tick(ended=[new.run_id])


async def timeouts(subject: Subject) -> None:
    """A timeout is end to end, also while the worker is busy; the tick that runs is not disturbed by it."""
    clause, executor = "collective_rpc: timeout", subject.executor
    begun = time.monotonic()

    async def late(timeout: float, *beside: Call) -> list[Any]:
        with subject.clause(clause):
            *others, answer = await together(*beside, partial(executor.collective_rpc, "ping", timeout))
        bad = isinstance(answer, Exception) and not isinstance(answer, TimeoutError)
        subject.require(not bad, clause, f"who is late gets a TimeoutError, not {answer!r}")
        return [*others, answer]

    (answer,) = await late(0)
    told = f"timeout=0 has passed before the answer, which is a TimeoutError and not {answer!r}"
    subject.require(isinstance(answer, TimeoutError), clause, told)
    for timeout in SHORT_S:
        await late(timeout)
    for timeout in (0.0, 0.05):
        busy, _ = await late(timeout, partial(_work, subject))
        if isinstance(busy, Exception):
            subject.broken(clause, f"a call disturbed the tick: {type(busy).__name__}: {busy}")
    over = time.monotonic() - begun - SLACK_S
    subject.require(over < subject.limit_s, clause, f"timeouts of 0.1 s in all took {over:.0f} s more")
    with subject.clause(clause):
        await executor.collective_rpc("ping")


async def _work(subject: Subject) -> None:
    """Some work, from start to end."""
    if subject.executor.granularity == "request":
        await subject.executor.execute_model([subject.request()])
        return
    new = subject.new()
    output = subject.decide(new)
    subject.take(output, await subject.executor.execute_step(output))
    await subject.tick(ended=[new.run_id])


async def free_loop(subject: Subject) -> None:
    """Others are served while it works. What happens once is not counted: the machine may have other things to do."""
    least = math.inf
    for _ in range(PAUSES):
        least = min(least, await _blocked_s(subject))
        if least <= BLOCKED_S:
            return
    told = f"it was blocked for {least:.2f} s at a stretch, each time; {BLOCKED_S} is the most"
    subject.broken("the event loop is free", told)


async def _blocked_s(subject: Subject) -> float:
    """How long nobody else could do anything during some work, at a stretch."""
    longest, failure = 0.0, None

    async def beat() -> None:
        nonlocal longest
        while True:
            begun = time.monotonic()
            await anyio.sleep(BEAT_S)
            longest = max(longest, time.monotonic() - begun - BEAT_S)

    with subject.clause("the event loop is free", subject.config.tick_timeout_s + subject.limit_s):
        async with anyio.create_task_group() as group:
            group.start_soon(beat)
            await anyio.lowlevel.checkpoint()
            (failure,) = await together(partial(_work, subject))
            await anyio.sleep(2 * BEAT_S)  # so that a beat has ended since
            group.cancel_scope.cancel()
        if isinstance(failure, Exception):
            raise failure
    return longest


async def health(subject: Subject) -> None:
    """It is well, and says so."""
    with subject.clause("check_health"):
        await subject.executor.check_health()


OF_STEPS = (ticks, free_loop, left_out, unknown_ids, finished_ids)
OF_TWO_TICKS = (in_flight,)
OF_REQUESTS = (whole_requests, free_loop, failures)
OF_ALL = (calls, arguments, among_residents, timeouts, health)
