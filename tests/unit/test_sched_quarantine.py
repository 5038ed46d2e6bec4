"""Who is to blame when workers die: halves of halves, one after the other, and nobody else fails."""

from __future__ import annotations

from typing import Any

import pytest
from sched_harness import Harness, names

from steploom.errors import GenerationFailed, RequestCancelled
from steploom.requests import DiffusionRequest, Event, Failed, Restarted
from steploom.sched.policy import Policy
from steploom.sched.quarantine import Door, Quarantine
from steploom.sched.state import RequestState

ENOUGH = RequestCancelled("enough")


class Mortal(Harness):
    """A harness whose worker dies in the step ``kills[name]`` (from 1) of a request, each time."""

    def __init__(self, **config: object) -> None:
        super().__init__(**{"max_retries": 1, "max_resident": 8, **config})
        self.kills: dict[str, int] = {}
        self.deaths = 0
        self.together: list[list[str]] = []  # the members of each tick
        self.ends: dict[str, str] = {}

    def turn(self) -> list[Event]:
        """A tick; or the worker dies in it."""
        output = self.scheduler.schedule()
        members = names(output)
        assert members, "no tick is idle"
        self.together.append(members)
        runs = dict(zip(members, output.run_ids, strict=True))
        if any(self.kills.get(name) == self.done.get(run, 0) + 1 for name, run in runs.items()):
            self.deaths += 1
            events = self.scheduler.restart(why=f"death {self.deaths}")
        else:
            events = self.answer(output)
        for event in events:
            if not isinstance(event, Restarted) and type(event).__name__ in ("Finished", "Failed"):
                assert event.request_id not in self.ends
                self.ends[event.request_id] = type(event).__name__
        return events

    def run(self, ticks: int = 500) -> None:
        """Ticks until all is done."""
        for _ in range(ticks):
            if not self.scheduler.has_work:
                return
            self.turn()
        raise AssertionError("never done")


@pytest.mark.parametrize("policy", ["fcfs", "deadline", "srpt"])
@pytest.mark.parametrize("killer", range(8))
def test_of_eight_the_one_that_kills_fails_alone(policy: str, killer: int) -> None:
    h = Mortal(policy=policy, max_retries=2)
    h.add(*"abcdefgh", steps=6)
    h.kills["abcdefgh"[killer]] = 3
    h.run()
    assert h.ends == {name: "Failed" if i == killer else "Finished" for i, name in enumerate("abcdefgh")}
    assert h.deaths == 3 + 3, "one, two retries, and three halvings"


def test_two_that_kill_fail_and_nobody_else() -> None:
    h = Mortal()
    h.add(*"abcdefgh", steps=6)
    h.kills.update(c=2, g=5)
    h.run()
    assert {name for name, end in h.ends.items() if end == "Failed"} == {"c", "g"}
    assert len(h.ends) == 8


def test_the_reason_names_the_deaths() -> None:
    h = Mortal()
    h.add("a", "b")
    h.kills["a"] = 1
    failed: list[Failed] = []
    while not failed:
        failed = [event for event in h.turn() if isinstance(event, Failed)]
    assert isinstance(failed[0].error, GenerationFailed)
    assert str(failed[0].error) == (
        "gave up after 3 attempts, at last with nobody else (max_retries=1): death 1; death 2; death 3"
    )


def test_a_suspect_runs_with_its_cell_alone_and_others_wait() -> None:
    h = Mortal()
    h.add(*"abcd", steps=5)
    h.kills["b"] = 2
    while h.deaths < 2:
        h.turn()
    h.add("new", steps=1)
    start = len(h.together)
    while h.deaths < 3:
        h.turn()
    assert {name for tick in h.together[start:] for name in tick} == {"a", "b"}
    h.run()
    assert h.ends == {"a": "Finished", "b": "Failed", "c": "Finished", "d": "Finished", "new": "Finished"}


def test_who_is_acquitted_makes_room_for_others_before_it_is_done() -> None:
    h = Mortal()
    h.add("a", "b", steps=9)
    h.kills["a"] = 2
    while "a" not in h.ends:
        h.turn()
    h.add("new", steps=1)
    ticks = [h.turn() and h.together[-1] for _ in range(4)]
    assert ticks == [["b"], ["b"], ["b", "new"], ["b"]], "it died in the second step"


def test_a_cell_is_not_acquitted_for_others_while_another_cell_waits() -> None:
    h = Mortal()
    h.add("a", "b", steps=9)
    h.kills["b"] = 2
    while h.deaths < 2:
        h.turn()
    start = len(h.together)
    while "a" not in h.ends:
        h.turn()
    assert h.together[start:] == [["a"]] * 9


def test_an_acquitted_one_that_is_suspected_again_has_to_finish_alone() -> None:
    """Here any two kill together; one by one they are innocent."""
    h = Mortal()
    h.add("a", "b", steps=6)
    for _ in range(2):
        h.scheduler.schedule()
        h.scheduler.restart()
    while "a" not in h.ends:  # the first cell
        assert h.turn()
        assert h.together[-1] == ["a"]
    h.turn()
    h.add("c", "d", steps=6)
    h.turn()
    assert names(h.scheduler.schedule()) == ["b", "c", "d"], "b is beyond the first step"
    h.scheduler.restart()
    start = len(h.together)
    while "b" not in h.ends:
        h.turn()
    assert h.together[start:] == [["b"]] * 6, "c and d are not spent, but b is"
    h.run()
    assert set(h.ends.values()) == {"Finished"}


def test_without_retries_residents_fail_and_those_that_wait_do_not() -> None:
    h = Mortal(max_retries=0, max_batch=2, max_resident=2)
    h.add(*"abc", steps=3)
    h.turn()
    h.scheduler.schedule()
    events = h.scheduler.restart(why="worker 0 died")
    assert [(type(event), event.request_id) for event in events] == [(Failed, "a"), (Failed, "b")]
    assert "gave up after 1 attempt (max_retries=0): worker 0 died" in str(events[0].error)  # type: ignore[union-attr]
    h.run()
    assert h.ends == {"c": "Finished"}


def test_who_only_waited_is_never_suspected() -> None:
    h = Mortal(max_batch=1, max_resident=1, max_retries=1)
    h.add("a", "b", steps=2)
    h.kills["a"] = 1
    h.turn()
    assert h.turn()[0].request_id == "a"
    h.run()
    assert h.ends == {"a": "Failed", "b": "Finished"}
    assert h.deaths == 2, "it was alone: nothing to halve"


def test_a_death_between_two_ticks_is_held_against_nobody() -> None:
    h = Mortal()
    h.add("a", steps=3)
    for _ in range(5):
        h.turn()
        assert h.scheduler.restart() == [Restarted(request_id="a", attempt=_ + 1)]
    h.run()
    assert h.ends == {"a": "Finished"}


def test_who_was_aborted_in_the_tick_may_have_been_the_one() -> None:
    h = Mortal(max_retries=1)
    h.add("a", "b", steps=3)
    for _ in range(2):
        h.scheduler.schedule()
        h.scheduler.finish_requests(["b"], ENOUGH)
        assert isinstance(h.scheduler.restart()[0], Restarted)
        h.add("b", steps=3)
    assert names(h.scheduler.schedule()) == ["a"]
    assert isinstance(h.scheduler.restart()[0], Failed)


@pytest.mark.parametrize("whom", ["a", "ab", "abcd", "cd"])
def test_suspects_that_are_aborted_do_not_keep_the_others_waiting(whom: str) -> None:
    h = Mortal()
    h.add(*"abcd", steps=4)
    h.kills["a"] = 1
    while h.deaths < 2:
        h.turn()
    h.add("new", steps=1)
    h.turn()
    h.scheduler.finish_requests(list(whom), ENOUGH)
    h.run()
    assert h.ends == {name: "Failed" if name == "a" else "Finished" for name in (*"abcd", "new") if name not in whom}


def test_ticks_ahead_of_a_cell_are_not_sent_empty() -> None:
    """The last step of a cell is under way, and the next one has to wait until it has landed."""
    h = Mortal()
    h.add("a", "b", steps=2)
    for _ in range(2):
        h.scheduler.schedule()
        h.scheduler.restart()
    h.answer(h.scheduler.schedule(), total_steps=2)
    last = h.scheduler.schedule()
    assert names(last) == ["a"]
    assert not h.scheduler.has_work
    h.answer(last)
    assert h.scheduler.has_work
    assert names(h.scheduler.schedule()) == ["b"]


def test_restarting_one_of_two_workers_waits_for_the_other_one() -> None:
    h = Mortal(max_batch=2, max_resident=4)
    h.add("a", "b", steps=4, height=1)
    h.add("c", "d", steps=4, height=2)
    h.scheduler.schedule()
    other = h.scheduler.schedule()
    assert names(other) == ["c", "d"]
    h.scheduler.restart(["a", "b"])
    while names(h.scheduler.schedule()) != ["a", "b"]:
        pass
    h.scheduler.restart(["a", "b"])
    assert h.scheduler.has_work
    ticks = [names(h.scheduler.schedule()) for _ in range(3)]
    assert ticks == [["c", "d"]] * 3, "a and b are held until it holds nobody"
    h.answer(other, finished=True)
    assert names(h.scheduler.schedule()) == ["a"]


def test_those_that_waited_for_a_place_wait_for_the_cells_too() -> None:
    h = Mortal(max_batch=2, max_resident=2)
    h.add(*"abcd", steps=3)
    h.kills["b"] = 2
    while h.deaths < 2:
        h.turn()
    start = len(h.together)
    while "b" not in h.ends:
        h.turn()
    assert h.together[start:] == [["a"]] * 3 + [["b"]] * 2
    h.scheduler.finish_requests(["d"], ENOUGH)
    h.run()
    assert h.ends == {"a": "Finished", "b": "Failed", "c": "Finished"}


def test_a_cell_whose_requests_the_worker_has_lost_is_still_on_trial() -> None:
    h = Mortal(max_retries=2)
    h.add(*"abcd", steps=3)
    for _ in range(3):
        h.scheduler.schedule()
        h.scheduler.restart()
    h.scheduler.finish_requests(["c"], ENOUGH)
    first = h.scheduler.schedule()
    assert names(first) == ["a", "b"]
    lost = h.answer(first, without=("a", "b"))
    assert [type(event) for event in lost] == [Restarted, Restarted], "which is not their fault"
    assert names(h.scheduler.schedule()) == ["a", "b"]


def test_who_has_died_early_is_acquitted_only_beyond_where_it_has_died_late() -> None:
    q = Quarantine(1)
    for past in (6, 2):
        assert q.died({"a": past, "b": past}, ["a", "b"], "it died", alone=False) == []
    assert q.advance(busy=False)
    q.judge({"a": 9})
    assert list(q.trial) == ["a"], "while b waits to be tried"
    q.leave("a")
    assert q.advance(busy=False)
    for steps, trial in ((5, ["b"]), (6, [])):
        q.judge({"b": steps})
        assert list(q.trial) == trial


def test_members_of_a_cell_that_were_in_no_tick_when_the_worker_died_are_tried_after_those_that_were() -> None:
    q = Quarantine(1)
    for _ in range(2):
        q.died(dict.fromkeys("abcd", 1), "abcd", "it died", alone=False)
    assert q.advance(busy=False)
    assert q.died({"a": 1}, ["a", "b"], "it died", alone=False) == []
    assert q.surrender() == [["a"], ["b"], ["c", "d"]]


class Noting(Policy):
    """Notes who is let through, in order, and who is to be before the others."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool | None]] = []

    def enqueue(self, state: Any, *, front: bool = False) -> None:
        self.told.append((state.request_id, front))

    def withdraw(self, state: Any) -> None:
        self.told.append((state.request_id, None))

    def choose(self, *args: Any) -> Any:
        raise NotImplementedError

    observe = retire = withdraw


def test_those_that_were_held_back_are_let_through_by_arrival_and_replayed_ones_before_all() -> None:
    q, policy = Quarantine(1), Noting()
    door = Door(policy, q)

    def state(arrival: int, *, front: bool) -> RequestState:
        request = DiffusionRequest("a", seed=1, request_id=str(arrival))
        return RequestState(request, arrival, 0.0, "?", f"{arrival}#1", attempt=int(front))

    early = [state(5, front=True), state(6, front=False)]
    for _ in range(2):
        q.died({"x": 1, "y": 1}, ["x", "y"], "it died", alone=False)
    door.close(early)
    assert policy.told == [("5", None), ("6", None)]
    for arrival, front in ((4, False), (2, True), (0, True), (3, False), (1, True)):
        door.enqueue(state(arrival, front=front), front=front)
    for name in ("x", "y"):
        q.leave(name)
    door.open(busy=True)
    fronts = [("5", True), ("2", True), ("1", True), ("0", True)]
    assert policy.told[2:] == [*fronts, ("3", False), ("4", False), ("6", False)]
