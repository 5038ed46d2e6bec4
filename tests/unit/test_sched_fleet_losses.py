"""What a fleet of workers does with those whose worker is lost: nothing that is known of them is lost with it."""

from __future__ import annotations

from test_sched_fleet import ask, fleet, names, tick

from steploom.errors import RequestCancelled
from steploom.requests import DiffusionRequest, Failed, Restarted


def test_who_is_replayed_by_another_worker_goes_first_there_whatever_the_policy() -> None:
    one = fleet(2, policy="srpt", max_batch=1, max_resident=1)
    first, second = one.members
    ask(one, "long", "busy")
    assert (tick(first), tick(second)) == (["long"], ["busy"])
    one.add_request(DiffusionRequest("short", seed=1, request_id="short", num_inference_steps=1))
    first.die("it died")
    one.finish_requests(["busy"], RequestCancelled("enough"))
    assert names(second.schedule()) == ["long"]


def test_what_is_held_against_a_request_goes_where_it_goes() -> None:
    one = fleet(2, max_retries=1)
    first, second = one.members
    ask(one, "a")
    first.schedule()
    assert [type(event) for event in first.die("it died")] == [Restarted]
    assert names(second.schedule()) == ["a"]
    assert [type(event) for event in second.die("it died")] == [Failed]


def test_how_many_serve_is_known() -> None:
    one = fleet(3)
    for change, count in (("die", 2), ("revive", 3), ("leave", 2), ("stay", 3), ("absent", 2)):
        getattr(one.members[0], change)(*["it died"] * (change == "die"))
        assert one.whole.workers == count


def test_those_that_a_worker_was_to_try_are_tried_together_by_one_other() -> None:
    one = fleet(3, max_retries=1)
    first, *others = one.members
    ask(one, "a")
    for other in others:
        other.absent()
    ask(one, "b")
    for _ in range(2):
        first.schedule()
        first.die("it died")
        first.revive()
    for member in others:
        member.revive()
    first.absent()
    first.give_up()
    (heir,) = [member for member in others if member.scheduler.confines("a")]
    assert heir.scheduler.confines("b")
    assert all(heir.scheduler.find(name) is not None for name in "ab")
    assert names(heir.schedule()) == ["a"]


def test_while_none_is_there_the_one_that_was_to_try_them_does_when_it_is_back() -> None:
    one = fleet(2, max_retries=1)
    first, second = one.members
    second.absent()
    ask(one, "a", "b")
    for _ in range(2):
        first.schedule()
        first.die("it died")
        first.revive()
    first.absent()
    first.give_up()
    assert first.scheduler.confines("a")
    first.revive()
    assert names(first.schedule()) == ["a"]
