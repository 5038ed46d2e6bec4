"""Who gets a place in a worker when many different shapes want one; order of those who wait for it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from sched_harness import Harness

from steploom.errors import RequestCancelled

COMMON = [f"common{index}" for index in range(100)]


def add_odd(h: Harness, count: int, steps: int = 400) -> list[str]:
    """Long requests, each of a shape of its own."""
    odd = [f"odd{index}" for index in range(count)]
    for index, name in enumerate(odd):
        h.add(name, height=1000 + index, steps=steps)
    return odd


def batches(h: Harness, ticks: int) -> tuple[list[int], Counter[str]]:
    """Sizes of the ticks of the common shape while as many of it live as fill a batch; steps by name."""
    sizes: list[int] = []
    steps: Counter[str] = Counter()
    done = 0
    for _ in range(ticks):
        if not h.scheduler.has_work:
            break
        members, events = h.tick()
        steps.update(members)
        if members[0].startswith("common") and done <= len(COMMON) - 8:
            sizes.append(len(members))
        done += sum(type(event).__name__ == "Finished" and event.request_id in h.heights for event in events)
    return sizes, steps


@pytest.mark.parametrize("odd_shapes", [15, 16, 30])
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_drain_bubble_of_many_odd_shapes(odd_shapes: int, when: str) -> None:
    """Long requests of as many shapes as there are places neither block a common shape nor drain its batch."""
    h = Harness(max_batch=8)
    if when != "after":
        odd = add_odd(h, odd_shapes)
    if when == "later":
        for _ in range(100):
            h.tick()
    h.add(*COMMON, height=512, steps=20)
    if when == "after":
        odd = add_odd(h, odd_shapes)
    sizes, steps = batches(h, 2000)
    assert len(sizes) > 150, "the common shape has its turns"
    assert sum(sizes) / len(sizes) >= 0.9 * 8
    assert sum(steps[name] > 100 for name in odd) >= 8, "so have odd ones"


def test_common_shape_keeps_all_but_one_place_where_there_is_one_batch_of_places() -> None:
    h = Harness(max_batch=8, max_resident=8)
    add_odd(h, 20, steps=10)
    h.tick()
    h.add(*COMMON, height=512, steps=20)
    sizes, _ = batches(h, 600)
    late = sizes[len(sizes) // 2 :]
    assert sum(late) / len(late) >= 7


def test_two_common_shapes_take_turns_with_the_favour() -> None:
    h = Harness(max_batch=8, max_waiting=5000)
    add_odd(h, 30)
    for height in (512, 768):
        h.add(*(f"{height}-{index}" for index in range(1000)), height=height, steps=5)
    full: Counter[str] = Counter()
    for _ in range(4000):
        members, _ = h.tick()
        if len(members) == 8:
            full[members[0][:3]] += 1
    assert min(full["512"], full["768"]) > 80


def test_places_are_not_kept_where_nobody_could_fill_them() -> None:
    """A worker with one batch of places gives them all to odd shapes, if nothing else waits."""
    h = Harness(max_batch=8, max_resident=8)
    add_odd(h, 12)
    for _ in range(8):
        h.tick()
    assert h.scheduler.num_running == 8


@pytest.mark.slow
@pytest.mark.parametrize(("max_batch", "max_resident"), [(1, 1), (1, 2), (2, 2), (4, 4), (4, 6), (4, 8), (8, 32)])
@pytest.mark.parametrize("depth", [1, 2, 3, pytest.param(9, marks=pytest.mark.slow)])
def test_nobody_starves_among_more_endless_shapes_than_places(max_batch: int, max_resident: int, depth: int) -> None:
    """Every shape always has ``depth`` waiting; each gets its share, the last one too."""
    h = Harness(max_batch=max_batch, max_resident=max_resident, max_waiting=10_000)
    shapes = max_resident + 5
    waiting = [0] * shapes
    served: Counter[int] = Counter()
    number = 0
    for _ in range(60 * shapes * max(1, depth)):
        for shape in range(shapes):
            while waiting[shape] < depth:
                h.add(f"{shape}-{number}", height=shape, steps=2 + number % 3)
                number, waiting[shape] = number + 1, waiting[shape] + 1
        output = h.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            shape = int(new.request.request_id.partition("-")[0])
            waiting[shape] -= 1
            served[shape] += 1
        h.answer(output)
    assert len(served) == shapes
    assert min(served.values()) >= 3


@pytest.mark.parametrize("seed", [0, 1])
def test_endless_crowds_do_not_starve_a_single_request(seed: int) -> None:
    """Each crowd is of a new shape: they would take all places that come free, one after another."""
    h = Harness(max_batch=8, max_resident=10, max_waiting=10_000)
    chance, number = random.Random(seed), 0
    for tick in range(310):
        while h.scheduler.num_waiting < 17:
            for _ in range(4):
                h.add(f"r{number}", height=100 + number // 4, steps=chance.randint(5, 60))
                number += 1
        if tick == 10:
            h.add("single", height=2, steps=1)
        if "single" in h.tick()[0]:
            return
    raise AssertionError("starved")


def linked(h: Harness, guesses: int) -> None:
    """Has ``guesses`` guesses turn out to share one observed key, and one long request of it stay."""
    names = [f"link{index}" for index in range(guesses)]
    h.keys = dict.fromkeys(names, "one")
    for index, name in enumerate(names):
        h.add(name, height=index, steps=2)
    h.drain(10_000)


def test_guesses_of_one_key_join_by_priority_and_arrival() -> None:
    h = Harness(max_batch=2, max_resident=2, max_waiting=1000)
    linked(h, 50)
    expected: list[tuple[int, int, str]] = []
    for index in range(300):
        name, priority = f"r{index}", (index * 7) % 4
        h.keys[name] = "one"
        h.add(name, height=(index * 13) % 50, steps=1 + index % 2, priority=priority)
        expected.append((priority, index, name))
    gone = {f"r{index}" for index in range(0, 300, 3)}
    h.scheduler.finish_requests(gone, RequestCancelled("enough"))
    joined: list[str] = []
    while h.scheduler.has_work:
        output = h.scheduler.schedule()
        joined += [new.request.request_id for new in output.scheduled_new_reqs]
        h.answer(output)
    assert joined == [name for _, _, name in sorted(expected) if name not in gone]


def test_distinct_priorities_come_in_order_whatever_leaves() -> None:
    h = Harness(max_batch=1, max_resident=1, max_waiting=1000)
    priorities = {f"r{index}": (index * 389) % 500 for index in range(500)}
    for name, priority in priorities.items():
        h.add(name, steps=1, priority=priority)
    gone = {name for name, priority in priorities.items() if priority % 5}
    h.scheduler.finish_requests(gone, RequestCancelled("enough"))
    order = [h.tick()[0][0] for _ in range(100)]
    assert order == sorted(priorities.keys() - gone, key=priorities.__getitem__)


def test_replays_go_before_others_of_their_priority_only() -> None:
    h = Harness(max_batch=2, max_resident=2)
    h.add("a", "b", steps=1)
    h.scheduler.schedule()
    h.add("c", steps=1)
    h.add("urgent", steps=1, priority=-1)
    h.scheduler.restart()
    assert [h.tick()[0] for _ in range(2)] == [["urgent", "a"], ["b", "c"]]


@pytest.mark.parametrize("alike", [True, False], ids=["one group", "groups"])
@pytest.mark.parametrize("shapes", [1, 40])
def test_index_is_bounded_while_requests_come_and_go(shapes: int, alike: bool) -> None:
    """Behind a request that never gets its turn, others come and are aborted: what they leave behind is bounded."""
    h = Harness(max_batch=1, max_resident=1, max_waiting=1000)
    if alike:
        linked(h, shapes)
    h.keys |= {"runs": "one"}
    h.add("runs", height=0, steps=10_000)
    h.tick()
    for shape in range(shapes):
        h.add(f"waits{shape}", height=shape, priority=-9)
    for turn in range(2000):
        h.add("brief", height=turn % shapes, priority=(-turn, turn, -9)[turn % 3])
        h.scheduler.finish_requests(["brief"], RequestCancelled("enough"))
    policy = h.scheduler.policy  # type: ignore[attr-defined]
    groups = policy._groups
    lines = [group.line for group in groups.all() if len(group.line)]
    assert sum(map(len, lines)) == shapes, "no payload is kept"
    for line in lines:
        (waiting,) = [user for turns in line._classes.values() for user in turns]
        most = 2 * len(line) + 70
        assert max(len(waiting.states), len(waiting.ranks), len(waiting.ages), len(line._ages)) <= most
    assert len(groups._hall) <= 2 * shapes + 70
