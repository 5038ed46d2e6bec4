"""What holds for each worker of a fleet as it does for a single one: memory, ageing; and what it costs to look."""

from __future__ import annotations

import pytest

from steploom.config import EngineConfig
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of
from steploom.requests import DiffusionRequest
from steploom.sched import Fleet, Member, build_scheduler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet(workers: int, clock: Clock | None = None, **config: object) -> Fleet:
    settings, clock = EngineConfig(**{"max_batch": 4, "memory_share": 1.0, **config}), clock or Clock()
    one = Fleet(settings, build_scheduler(settings, clock))
    for _ in range(workers - 1):
        one.add(build_scheduler(settings, clock))
    return one


def ask(one: Fleet, *names: str, **fields: object) -> None:
    for name in names:
        one.add_request(DiffusionRequest(name, seed=1, request_id=name, num_inference_steps=9, **fields))


def names(output: SchedulerOutput) -> list[str]:
    return [request_id_of(run) for run in output.run_ids]


def tick(member: Member, *, ends: bool = False) -> list[str]:
    output = member.schedule()
    reports = [
        RequestReport(
            run_id=run, stepped=True, step=1, total_steps=9, batch_key="key", batch_requests=1, rows=1, held_bytes=10,
            finished=ends,
        )
        for run in output.run_ids
    ]  # fmt: skip
    member.update_from_output(output, RunnerOutput(tick=output.tick, reports=reports, seconds=1.0, room_bytes=25))
    return names(output)


def test_memory_bounds_the_residents_of_each_worker() -> None:
    one = fleet(2, policy="fcfs")
    ask(one, "warm")
    tick(one.members[0], ends=True)
    ask(one, *(f"r{i}" for i in range(8)))
    for member in one.members:
        assert len(tick(member)) == 2, "2 x 10 of 25 bytes"


def test_who_has_risen_to_a_better_class_keeps_it_where_it_goes() -> None:
    clock = Clock()
    one = fleet(2, clock, max_batch=1, max_resident=1, priority_ageing_s=10)
    first, second = one.members
    ask(one, "a", "b", priority=-1)
    assert [tick(first), tick(second)] == [["a"], ["b"]]
    ask(one, "old", priority=5)
    home = next(member for member in one.members if member.scheduler.find("old") is not None)
    ask(one, *(f"better{i}" for i in range(4)))
    clock.now = 11
    tick(home)
    state = home.scheduler._alive["old"]
    state.priority = 0  # as its line had it rise
    home.leave()
    heir = next(member for member in one.members if member is not home)
    found = heir.share.first()
    assert found is not None
    assert found[1] is state


def test_the_first_places_are_found_without_a_look_at_all_that_wait() -> None:
    one = fleet(1, max_waiting=1000)
    (member,) = one.members
    ask(one, *(f"r{i}" for i in range(500)))
    assert [place[-1] for place in member.share.best(3)] == [0, 1, 2]
    assert member.share.best(0) == []
    assert len(member.share.best(501)) == 500
    state = member.scheduler._alive["r0"]
    member.scheduler.adopt(state, member.scheduler.release(state))
    assert [place[-1] for place in member.share.best(3)] == [0, 1, 2], "once each, though it has left and come back"
    looked = []
    member.share._waiting = Counting(member.share._waiting, looked)
    member.share.best(3)
    assert len(looked) <= 4


class Counting(dict):
    def __init__(self, content: dict, looked: list) -> None:
        super().__init__(content)
        self.looked = looked

    def get(self, key: object, default: object = None) -> object:
        self.looked.append(key)
        return super().get(key, default)

    def values(self) -> object:
        raise AssertionError("it looks at all")


def test_what_was_learned_with_one_worker_counts_for_those_that_wait_with_others() -> None:
    one = fleet(2, policy="srpt", max_batch=1, max_resident=1)
    first, second = one.members
    ask(one, "a", "b", "c", "d", "e", "f", height=512)
    before = {name: one._find(name).standalone_s for name in "cdef"}
    assert len(first.share), "some wait with each"
    assert len(second.share), "some wait with each"
    tick(first)
    after = {name: one._find(name).standalone_s for name in "cdef"}
    assert all(after[name] > before[name] for name in "cdef"), "a second for each step, not what was guessed"
    for member in one.members:
        waiting = [one.state for one in member.share._waiting.values()]
        assert member.share.queued_s == pytest.approx(sum(state.standalone_s for state in waiting))
        assert all(place[2] == (state.standalone_s,) for place, state, _ in member.share._waiting.values())
    assert one.whole.queued_s == pytest.approx(sum(member.share.queued_s for member in one.members))
    assert one.wait_s(one._find("c")) >= 0
