"""A forward that ran out of memory: batches have fewer rows for a while, and everybody is done."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_harness import Harness

from steploom.protocol import RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import Event
from steploom.sched.curve import Curve

ROOM = 6
"""Rows that the device has memory for."""


class Tight(Harness):
    """More than ``room`` rows of a tick run out of memory: the worker bisects, and says so."""

    room = ROOM

    def answer(self, output: SchedulerOutput, /, *, without: tuple[str, ...] = (), **fields: Any) -> list[Event]:
        reports = [
            self.report(run, rows=2, total_steps=self.steps[request_id_of(run)], **fields) for run in output.run_ids
        ]
        rows = 2 * len(reports)
        result = RunnerOutput(
            tick=output.tick, reports=reports, seconds=1.0, too_many_rows=rows if rows > self.room else 0
        )
        return self.scheduler.update_from_output(output, result)


def test_after_an_overflow_batches_have_half_the_rows_and_everybody_is_done() -> None:
    h = Tight(policy="deadline", max_batch=8)
    h.add(*(f"r{number}" for number in range(8)), steps=10)
    sizes = [len(h.tick()[0]) for _ in range(12)]
    assert sizes[0] == 8
    assert max(sizes[2:]) <= 4
    assert max(sizes[4:]) <= ROOM // 2
    h.drain()
    assert all(h.done[run] == 10 for run in h.done)


def test_who_comes_later_joins_within_the_lower_bound() -> None:
    h = Tight(policy="deadline", max_batch=8)
    h.add(*(f"r{number}" for number in range(8)), steps=6)
    h.drain()
    h.add(*(f"s{number}" for number in range(8)), steps=6)
    assert {len(h.tick()[0]) for _ in range(6)} <= {1, 2, 3}
    h.drain()


@pytest.mark.parametrize(("most", "room"), [(8, ROOM), (3, 4)], ids=["8 of 16 rows", "3 of 6 rows: half is 1.5"])
def test_the_bound_recovers_when_there_is_room_again(most: int, room: int) -> None:
    h = Tight(policy="srpt", max_batch=most)
    h.room = room
    h.add(*(f"r{number}" for number in range(8)), steps=6)
    h.drain()
    h.room = 1000
    for wave in range(80):
        h.add(*(f"{wave}x{number}" for number in range(8)), steps=10)
        largest = 0
        while h.scheduler.has_work:
            largest = max(largest, len(h.tick()[0]))
        if largest == most:
            return
    raise AssertionError("it never recovers")


@given(each=st.integers(1, 8), members=st.lists(st.integers(2, 16), min_size=1, max_size=3))
def test_from_any_overflow_enough_full_batches_bring_the_bound_back_above_it(each: int, members: list[int]) -> None:
    curve, most = Curve(), each * max(members)
    for count in members:
        curve.overflowed(each * count)
    for _ in range(20_000):
        curve.observe(each * max(1, int(curve.limit // each)), 1.0)
        if curve.limit >= most:
            return
    raise AssertionError(f"it stays at {curve.limit} of {most} rows")


@pytest.mark.parametrize(("overflows", "ticks"), [(1, 32), (2, 64), (3, 128), (20, 4096)])
def test_each_overflow_doubles_the_ticks_until_there_may_be_more(overflows: int, ticks: int) -> None:
    curve = Curve()
    for _ in range(overflows):
        curve.overflowed(16)
    for _ in range(ticks - 1):
        curve.observe(8, 1.0)
    assert curve.limit == 8
    curve.observe(8, 1.0)
    assert curve.limit == 11


def test_batches_that_are_not_full_say_nothing_about_more_rows() -> None:
    curve = Curve()
    curve.overflowed(32)
    for _ in range(1000):
        curve.observe(8, 1.0)
    assert curve.limit == 16


def test_another_shape_is_not_bounded_by_it() -> None:
    h = Tight(policy="deadline", max_batch=8)
    h.add(*(f"r{number}" for number in range(8)), steps=3, height=1024)
    h.drain()
    h.room = 1000
    h.add(*(f"s{number}" for number in range(8)), steps=3, height=512)
    assert max(len(h.tick()[0]) for _ in range(3)) == 8
