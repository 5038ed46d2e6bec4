"""Ranks of a worker: what they find out for all, and when they part."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from steploom.errors import ConfigError
from steploom.protocol import ErrorInfo, RequestReport, RunnerOutput
from steploom.worker.ranks import spmd as ranks
from steploom.worker.ranks.group import outcome_of
from steploom.worker.ranks.spmd import Did, Failed, First, Link, Other


class Lost(BaseException):
    pass


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[First, Other]:
    def lose(why: str) -> None:
        raise Lost(why)

    monkeypatch.setattr(ranks, "lose", lose)
    one, other = socket.socketpair()
    return First([Link(one.detach())], "", 0.2, 0.0), Other(1, 2, "", Link(other.detach()), 0.2)


def both(one: Callable[[], Any], other: Callable[[], Any]) -> list[Any]:
    """What each of them returned or raised."""
    outcomes: list[Any] = [None, None]

    def run(i: int, part: Callable[[], Any]) -> None:
        try:
            outcomes[i] = part()
        except BaseException as fault:  # noqa: BLE001 - it is the outcome
            outcomes[i] = fault

    threads = [threading.Thread(target=run, args=(i, part)) for i, part in enumerate((one, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def test_what_rank_0_finds_holds_for_all(pair: tuple[First, Other]) -> None:
    first, other = pair
    assert both(lambda: first.settle("crosstalk"), lambda: other.settle(None)) == ["crosstalk", "crosstalk"]
    assert both(lambda: first.settle([1, 3]), lambda: other.settle([])) == [[1, 3], [1, 3]]


def test_all_meet_once(pair: tuple[First, Other]) -> None:
    first, other = pair
    for _ in range(2):
        assert both(first.meet, other.meet) == [None, None]


def test_rank_0_says_why_another_cannot_load(pair: tuple[First, Other]) -> None:
    first, other = pair
    other._link.say(Failed(ErrorInfo.of(ConfigError("device='cuda:1': there is one"))))
    with pytest.raises(ConfigError, match="cuda:1"):
        first.meet()


def test_a_fault_that_all_have_is_the_requests(pair: tuple[First, Other]) -> None:
    first, other = pair
    fault = ValueError("bad shape")
    assert both(lambda: first.fault(fault), lambda: other.fault(fault)) == [None, None]


@pytest.mark.parametrize("mine", [ValueError("x"), MemoryError("y")], ids=str)
def test_a_fault_that_others_do_not_have_ends_the_worker(pair: tuple[First, Other], mine: Exception) -> None:
    first, other = pair
    assert isinstance(both(lambda: first.fault(mine), lambda: other.fault(MemoryError("x")))[0], Lost)


def test_who_alone_has_a_fault_does_not_wait_for_ever(pair: tuple[First, Other]) -> None:
    first, other = pair
    with pytest.raises(Lost, match="rank 0 did not"):
        other.fault(ValueError("x"))
    with pytest.raises(Lost, match="does not agree"):
        first.compare(Did([]))
    with pytest.raises(Lost, match="has not failed"):
        first.fault(ValueError("x"))


def test_who_is_gone_is_not_waited_for(pair: tuple[First, Other]) -> None:
    first, other = pair
    other._link._connection.close()
    with pytest.raises(Lost, match="gone"):
        first.compare(Did([]))


@pytest.mark.parametrize(
    "change",
    [{"step": 3}, {"finished": True}, {"batch_key": "b"}, {"batch_requests": 2.0}, {"error": ErrorInfo("X", "")}],
    ids=lambda change: next(iter(change)),
)
def test_ticks_that_went_another_way_are_told_apart(pair: tuple[First, Other], change: dict[str, Any]) -> None:
    first, other = pair
    same = {
        "run_id": "a#0",
        "phase": "denoise",
        "step": 2,
        "batch_key": "a",
        "batch_requests": 1.5,
        "total_steps": None,
    }

    def did(room: int, **report: Any) -> Did:
        return outcome_of(RunnerOutput(tick=1, reports=[RequestReport(**report)], room_bytes=room), Exception())

    other._link.say(did(7, **same))
    assert [one.room_bytes for one in first.compare(did(9, **same))] == [7]
    other._link.say(did(7, **{**same, **change}))
    with pytest.raises(Lost, match="does not agree"):
        first.compare(did(9, **same))
