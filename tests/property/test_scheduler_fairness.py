"""No request starves, whatever arrives after it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from machine import often

from steploom.config import EngineConfig
from steploom.protocol import RequestReport, RunnerOutput
from steploom.requests import DiffusionRequest
from steploom.sched import SchedulerInterface, build_scheduler
from steploom.sched.fcfs import TERM
from steploom.sched.groups import PASSES
from steploom.sched.lines import RESERVE


class Flood:
    """Requests of several shapes that never end: each shape always has ``depth`` requests waiting."""

    def __init__(self, scheduler: SchedulerInterface, shapes: int, depth: int, steps: int) -> None:
        self.scheduler = scheduler
        self.shapes, self.depth, self.steps = shapes, depth, steps
        self.left: dict[str, int] = {}
        self.shape_of: dict[str, int] = {}
        self.waiting = [0] * shapes

    def submit(self, name: str, shape: int, steps: int) -> None:
        self.scheduler.add_request(DiffusionRequest(name, seed=1, request_id=name, height=shape))
        self.left[name], self.shape_of[name] = steps, shape

    def pour(self) -> None:
        for shape in range(self.shapes):
            while self.waiting[shape] < self.depth:
                self.submit(f"flood{len(self.left)}", shape, self.steps)
                self.waiting[shape] += 1

    def tick(self) -> list[str]:
        """One tick; the names of those that took part."""
        output = self.scheduler.schedule()
        names = [run.rpartition("#")[0] for run in output.run_ids]
        for new in output.scheduled_new_reqs:
            if new.request.request_id.startswith("flood"):
                self.waiting[self.shape_of[new.request.request_id]] -= 1
        for name in names:
            self.left[name] -= 1
        reports = [
            RequestReport(run_id=run, batch_key=f"key{self.shape_of[name]}", finished=self.left[name] == 0)
            for run, name in zip(output.run_ids, names, strict=True)
        ]
        self.scheduler.update_from_output(output, RunnerOutput(tick=output.tick, reports=reports))
        return names


@often(60)
@given(
    scheduler=st.sampled_from(["step", "request"]),
    max_batch=st.integers(1, 4),
    spare=st.integers(0, 4),
    shapes=st.integers(1, 12),
    depth=st.integers(1, 6),
    flood_steps=st.integers(1, 5),
    head_start=st.integers(0, 12),
    same_shape=st.booleans(),
    policy=st.sampled_from(["fcfs", "deadline", "srpt"]),
)
@example(
    scheduler="step",
    max_batch=2,
    spare=2,
    shapes=2,
    depth=1,
    flood_steps=2,
    head_start=0,
    same_shape=False,
    policy="deadline",
)
def test_nobody_starves(
    scheduler: str,
    max_batch: int,
    spare: int,
    shapes: int,
    depth: int,
    flood_steps: int,
    head_start: int,
    same_shape: bool,
    policy: str,
) -> None:
    """A victim among shapes that are flooded without end is done in a number of ticks that is known beforehand."""
    config = EngineConfig(scheduler=scheduler, max_batch=max_batch, max_resident=max_batch + spare, policy=policy)
    flood = Flood(build_scheduler(config, lambda: 0.0), shapes, depth, flood_steps)
    for _ in range(head_start):
        flood.pour()
        flood.tick()
    flood.pour()
    shape = 0 if same_shape else shapes
    flood.submit("victim", shape, 3)
    # A place comes free within the time that all residents need if they take turns; at most `depth` requests of the
    # victim's own shape and one of each other go first, each needing such a place; the favour may pass on twice
    # before; then the victim gets every (shapes + 1)th tick.
    rotation = shapes + 1
    place = rotation * (flood_steps + 1)
    reigns = 2 * TERM * max_batch if depth > 1 and max_batch > 1 else 0
    bound = ((depth + 1) * rotation + reigns) * place + 3 * rotation
    if policy != "fcfs":  # in which a shape may be passed over, and one of a user's requests by eight others
        bound = RESERVE * bound + 4 * rotation * PASSES
    for _ in range(bound):
        flood.pour()
        flood.tick()
        if flood.left["victim"] == 0:
            return
    raise AssertionError(f"not done after {bound} ticks; {flood.left['victim']} steps are left")
