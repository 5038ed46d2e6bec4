"""The clauses about the end of a worker, and of an executor, and what comes after it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from steploom.errors import EngineError
from steploom.executor.abstract import DiffusionExecutor
from steploom.requests import DiffusionOutput
from steploom.testing.subject import Subject, together


async def recovery(subject: Subject) -> None:
    """Where a worker can be replaced, the next one serves, and holds nothing of what the lost one has held."""
    clause, executor = "recover", subject.executor
    if type(executor).recover is DiffusionExecutor.recover:
        return
    left = subject.new() if executor.granularity == "step" else None
    if left is not None:
        await subject.tick(left)
    with subject.clause(clause, subject.config.start_timeout_s + subject.limit_s):
        if not executor.discard(EngineError("check_executor has it replaced")):
            return
        await executor.recover()
    with subject.clause(clause):
        if left is None:
            (output,) = await executor.execute_model([subject.request()])
            subject.require(output.error is None, clause, f"the next request failed: {output.error}")
            return
        new = subject.new()
        result = await executor.execute_step(subject.decide(new, cached=[left.run_id]))
    found = [report.run_id for report in result.reports if report.error is None]
    subject.require(left.run_id not in found, clause, f"{left.run_id} is still there, which the lost worker has held")
    subject.require(new.run_id in found, clause, f"{new.run_id} was not served")
    await subject.tick(ended=[new.run_id])


async def refusals(subject: Subject, clause: str) -> None:
    """Once it was shut down, or is lost, it says so, and does not hang."""
    executor = subject.executor
    work = (
        partial(executor.execute_step, subject.decide())
        if executor.granularity == "step"
        else partial(executor.add_requests, [subject.request()])
    )
    asked = {"execute": work, "collective_rpc": partial(executor.collective_rpc, "ping"),
             "check_health": executor.check_health}  # fmt: skip
    for name, call in asked.items():
        with subject.clause(clause):
            (answer,) = await together(call)
        told = f"{name} {clause} gave {answer!r}, and no EngineError"
        refused = isinstance(answer, EngineError) or (name == "execute" and _unserved(answer))
        subject.require(refused, clause, told)


def _unserved(answer: Any) -> bool:
    """Whether no request was served: each output has an error."""
    outputs = cast("list[Any]", answer) if isinstance(answer, list) else [None]
    return all(isinstance(output, DiffusionOutput) and output.error is not None for output in outputs)
