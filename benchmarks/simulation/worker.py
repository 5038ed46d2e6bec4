"""A worker that has no model: it answers ticks with what they would cost."""

from __future__ import annotations

import dataclasses

from simulation.costs import CostTable, Shape, named
from steploom.protocol import NewRequest, RequestReport, RunnerOutput, SchedulerOutput


@dataclasses.dataclass(slots=True)
class Resident:
    """A request that the worker holds."""

    run_id: str
    shape: Shape
    key: str
    steps: int
    rows: int
    encode_s: float
    decode_s: float
    done: int = 0


class SimulatedWorker:
    """Advances each member of a tick by one step, as the runner does, and says how long that would have taken.

    A member encodes in the tick in which it joins, and decodes in that of its last step. Members of one shape share a
    forward, others do not.
    """

    def __init__(self, costs: CostTable) -> None:
        self.costs = costs
        self.residents: dict[str, Resident] = {}

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        """One tick. The clock is not touched: the answer says in ``seconds`` what it cost."""
        residents = self.residents
        for run in output.finished_req_ids:
            residents.pop(run, None)
        members = [residents[run] for run in output.scheduled_cached_reqs if run in residents]
        chores_s = 0.0
        for new in output.scheduled_new_reqs:
            member = residents[new.run_id] = self._started(new)
            chores_s += member.encode_s
            members.append(member)
        sharing: dict[str, list[Resident]] = {}
        for member in members:
            sharing.setdefault(member.key, []).append(member)
        steps_s = 0.0
        for mates in sharing.values():
            steps_s += self.costs.tick_s(mates[0].shape, sum([mate.rows for mate in mates]))
        reports: list[RequestReport] = []
        for member in members:
            report = self._stepped(member, len(sharing[member.key]), steps_s)
            chores_s += report.decode_s
            reports.append(report)
        seconds = steps_s + chores_s
        return RunnerOutput(tick=output.tick, reports=reports, seconds=seconds, forward_s=seconds, chores_s=chores_s)

    def _started(self, new: NewRequest) -> Resident:
        params = new.request.params
        shape = (params["width"], params["height"])
        images = params.get("num_images_per_prompt", 1)
        rows, costs = images * self.costs.rows_per_image, self.costs.of(shape)
        return Resident(
            run_id=new.run_id,
            shape=shape,
            key=f"denoiser:{named(shape)}",
            steps=params["num_inference_steps"],
            rows=rows,
            encode_s=costs.encode_s,
            decode_s=images * costs.decode_s,
        )

    def _stepped(self, member: Resident, mates: int, steps_s: float) -> RequestReport:
        member.done += 1
        report = RequestReport(
            run_id=member.run_id,
            phase="denoise",
            stepped=True,
            step=member.done,
            total_steps=member.steps,
            batch_key=member.key,
            batch_requests=mates,
            rows=member.rows,
            denoise_s=steps_s,
        )
        if member.done == 1:
            report.encode_s = member.encode_s
        if member.done == member.steps:
            report.phase, report.finished, report.decode_s = "done", True, member.decode_s
            del self.residents[member.run_id]
        return report
