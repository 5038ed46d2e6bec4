"""Residents are bounded by measured bytes: what they keep, and the peak of their ticks, fit into the memory."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from sched_harness import Harness

from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import Event

HELD: dict[Any, int] = {512: 10, 1024: 40, 4096: 500}
STEP: dict[Any, int] = {512: 5, 1024: 20, 4096: 100}
"""Bytes that a request of a height keeps, and those that its two rows take in a tick on top of that."""


class Weighed(Harness):
    """A worker with ``room`` bytes, which knows what it holds. ``most`` is the most that a tick has taken."""

    def __init__(self, room: int = 100, **config: Any) -> None:
        super().__init__(**{"max_batch": 8, "memory_share": 1.0, "policy": "deadline", **config})
        self.room = room
        self.held: dict[str, int] = {}
        self.most = 0
        self.residents: list[int] = []
        self.chores = 0

    def warmed(self, *heights: int) -> Weighed:
        """After one request of each of these."""
        for height in heights:
            self.add(f"warm{height}", height=height)
        self.drain()
        assert not self.held
        self.most = 0
        self.residents.clear()
        return self

    def answer(self, output: SchedulerOutput, /, *, without: tuple[str, ...] = (), **fields: Any) -> list[Event]:
        for run in output.finished_req_ids:
            self.held.pop(run, None)
        assert output.run_ids, "a tick in which nobody steps"
        heights = {run: self.heights[request_id_of(run)] for run in output.run_ids}
        self.held |= {run: HELD[height] for run, height in heights.items()}
        peak = max(sum(STEP[height] for height in heights.values()), self.chores)
        self.most = max(self.most, sum(self.held.values()) + peak)
        self.residents.append(len(self.held))
        new = {one.run_id for one in output.scheduled_new_reqs}
        reports = [self._weighed(run, run in new, fields) for run in output.run_ids]
        for report in reports:
            if report.finished:
                del self.held[report.run_id]
        chores = {"chores_s": 0.5} if self.chores else {}
        result = RunnerOutput(
            tick=output.tick, reports=reports, seconds=1.0, peak_bytes=peak, room_bytes=self.room, **chores
        )
        return self.scheduler.update_from_output(output, result)

    def _weighed(self, run: str, new: bool, fields: dict[str, Any]) -> RequestReport:
        total = self.steps[request_id_of(run)]
        held = self.held[run] if new else 0
        return self.report(run, **{"rows": 2, "total_steps": total, "held_bytes": held, **fields})

    def steps_done(self, prefix: str) -> int:
        return sum(done for run, done in self.done.items() if run.startswith(prefix))


@pytest.fixture(params=["deadline", "srpt", "fcfs"])
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_residents_of_two_sizes_keep_and_take_stays_within_the_memory_and_uses_it(policy: str) -> None:
    h = Weighed(room=140, policy=policy).warmed(512, 1024)
    for number in range(6):
        h.add(f"s{number}", steps=6, height=512)
        h.add(f"l{number}", steps=6, height=1024)
    h.drain()
    assert 100 < h.most <= 140
    assert h.steps_done("s") == h.steps_done("l") == 36


def test_the_share_of_the_memory_is_a_setting(policy: str) -> None:
    for share, most in ((1.0, 8), (0.5, 4), (None, 8)):
        h = Weighed(room=120, policy=policy, memory_share=share).warmed(512)
        h.add(*(f"r{number}" for number in range(8)), steps=4)
        h.drain()
        assert max(h.residents) == most


def test_more_join_as_residents_leave() -> None:
    h = Weighed(room=100).warmed(512, 1024)
    h.add("large", steps=3, height=1024, deadline=5)
    assert h.tick()[0] == ["large"]
    h.add(*(f"r{number}" for number in range(8)), steps=30)
    h.drain()
    assert h.residents[1] == 5, "40 + 4 x 10 + 20"
    assert max(h.residents) == 6, "6 x (10 + 5)"
    assert h.most <= 100


def test_who_is_larger_than_the_memory_runs_and_runs_alone(policy: str) -> None:
    h = Weighed(room=100, policy=policy).warmed(512, 4096)
    h.add("huge", steps=5, height=4096)
    h.add(*(f"r{number}" for number in range(4)), steps=5)
    beside: set[int] = set()
    while h.scheduler.has_work:
        if "huge" in h.tick()[0]:
            beside.add(h.residents[-1])
    assert beside == {1}
    assert h.steps_done("huge") == h.steps_done("r0") == 5


@pytest.mark.parametrize("priority", [0, -1])
def test_who_does_not_fit_waits_for_a_bounded_time_behind_a_stream_of_those_that_do(priority: int, policy: str) -> None:
    h = Weighed(room=100, policy=policy).warmed(512, 4096)
    h.add("huge", steps=2, height=4096, deadline=1e6)
    for tick in range(400):
        for number in range(2):
            if h.scheduler.num_waiting < 20:
                h.add(f"s{tick}x{number}", steps=3 + (tick + number) % 4, deadline=1.0, priority=priority)
        if h.steps_done("huge") < 2:
            h.tick()
    assert h.steps_done("huge") == 2
    h.drain()


def test_memory_goes_to_a_user_that_has_had_less_even_where_there_are_places_for_all() -> None:
    h = Weighed(room=100, policy="fcfs", max_resident=16).warmed(512, 1024)
    h.add(*[f"a{number}" for number in range(4)], height=512, steps=1, user="ann")
    h.add(*[f"b{number}" for number in range(5)], height=512, steps=20, user="ann")
    assert len(h.tick()[0]) == 6
    h.add("c", height=1024, steps=20, user="bob")
    assert h.tick()[0] == ["b0", "b1"]
    assert h.tick()[0] == ["c"]


def test_nothing_is_bounded_while_nobody_says_how_much_memory_there_is_or_what_a_request_takes() -> None:
    h = Weighed(room=0).warmed(512)
    h.add(*(f"r{number}" for number in range(8)))
    assert len(h.tick()[0]) == 8
    fresh = Weighed(room=100)
    fresh.scheduler.costs.room_bytes = 100
    fresh.add(*(f"r{number}" for number in range(8)))
    assert len(fresh.tick()[0]) == 8


def test_sizes_that_were_never_seen_are_estimated_from_the_nearest() -> None:
    h = Weighed(room=100)
    h.add("warm", height=512, width=512)
    h.drain()
    h.heights = dict.fromkeys(h.heights, 512)
    h.add(*(f"r{number}" for number in range(8)), height=1024, width=512)
    assert len(h.tick()[0]) == 3, "twice the pixels: 3 x 2 x (10 + 5)"


def test_requests_whose_calls_are_never_merged_are_bounded_by_others_of_their_key() -> None:
    h = Weighed(room=35)
    h.add("warm")
    h.tick(rows=0)
    h.tick(rows=0)
    h.add(*(f"r{number}" for number in range(8)))
    assert len(h.tick()[0]) == 3


def test_the_peak_of_encoders_and_decoders_counts_too() -> None:
    h = Weighed(room=100)
    h.chores = 60
    h.warmed(512)
    h.add(*(f"r{number}" for number in range(8)))
    assert len(h.tick()[0]) == 4, "4 x 10 + 60"


def test_those_that_are_aside_hold_memory() -> None:
    h = Weighed(room=100).warmed(512)
    h.add(*(f"r{number}" for number in range(3)), steps=9)
    h.tick()
    h.tick(aside=True, batch_requests=0)
    h.add(*(f"s{number}" for number in range(8)), steps=9)
    new = h.scheduler.schedule().scheduled_new_reqs
    assert len(new) == 4, "3 x 10 + 4 x (10 + 5)"


def test_while_all_residents_are_aside_who_is_too_large_waits(policy: str) -> None:
    h = Weighed(room=100, policy=policy).warmed(512)
    h.add("r", steps=9)
    h.tick()
    h.tick(aside=True, batch_requests=0)
    h.add("huge", steps=2, height=4096)
    h.scheduler.costs.curve("key4096").footprint.observe_request(500, 2)
    h.scheduler.demands.restore([["?|height=4096", True, "key4096", 2, 9, None]])
    assert h.tick(aside=True)[0] == ["r"]
    h.drain()


def test_what_a_resident_was_measured_to_keep_counts_not_what_others_of_its_kind_do() -> None:
    h = Weighed(room=100).warmed(512)
    h.add("r0", steps=9)
    h.tick(held_bytes=70)
    h.add("r1", "r2")
    assert h.tick()[0] == ["r0"]


def test_who_is_paused_holds_memory() -> None:
    h = Weighed(room=60, preempt=True).warmed(512)
    h.add(*(f"r{number}" for number in range(4)), steps=30)
    h.tick()
    h.add("urgent", steps=2, priority=-1)
    assert sorted(h.tick()[0]) == ["r0", "r1", "r2", "r3"]
    h.drain()
    assert h.most <= 60


@pytest.mark.parametrize("amends", [False, True])
def test_two_ticks_in_flight(amends: bool, policy: str) -> None:
    h = Weighed(room=90, policy=policy).warmed(512, 1024)
    for number in range(12):
        h.add(f"s{number}", steps=2 + number % 3, height=512)
    for number in range(3):
        h.add(f"l{number}", steps=2 + number, height=1024)
    flights: deque[SchedulerOutput] = deque()
    later = list(range(12, 30)) if amends else []
    for _ in range(200):
        while len(flights) < 2 and h.scheduler.has_work:
            flights.append(h.scheduler.schedule())
        if later:
            h.add(f"s{later.pop()}", steps=1 + len(later) % 3, height=512)
        amendment = h.scheduler.amend() if len(flights) > 1 else None
        if amendment is not None:
            flights[-1] = flights[-1].amended(amendment)
        if flights:
            h.answer(flights.popleft())
    assert not h.scheduler.has_work
    assert 60 < h.most <= 90


def test_the_bytes_are_shown_and_kept_for_the_next_start(policy: str) -> None:
    first, second = Weighed().warmed(512, 1024).scheduler, Weighed(policy=policy)
    shown = {cost.batch_key: (cost.held_bytes, cost.peak_bytes) for cost in first.costs.shown()}
    assert shown == {"key512": (5, 2.5), "key1024": (20, 10)}
    assert second.scheduler.costs.restore(first.costs.state())
    second.scheduler.demands.restore(first.demands.state())
    second.scheduler.costs.room_bytes = 60
    second.add(*(f"r{number}" for number in range(8)))
    assert len(second.tick()[0]) == 4
    old = first.costs.state()
    for curve in old["curves"].values():
        del curve["bytes"]
    third = Weighed().scheduler
    assert third.costs.restore(old), "as an earlier version kept it"
    assert {cost.held_bytes for cost in third.costs.shown()} == {0}
