"""When a tick began and ended, as the engine sees it."""

from __future__ import annotations

import pytest

from steploom.engine import flights as module
from steploom.engine.flights import Flights
from steploom.protocol import RunnerOutput, SchedulerOutput


def test_a_tick_whose_forerunner_was_read_late_lasts_as_the_worker_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    flights = Flights(2)
    first, second = (flights.depart(SchedulerOutput(tick)) for tick in (1, 2))
    first.result, second.result = RunnerOutput(tick=1, seconds=2.0), RunnerOutput(tick=2, seconds=3.0)
    now[0] = 15.0  # both lay there, unread
    one, other = flights.land()
    assert (one.began, one.ended) == (10.0, 15.0)
    assert (other.began, other.ended) == (12.0, 15.0)


def test_a_tick_that_was_sent_ahead_begins_when_its_forerunner_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    flights = Flights(2)
    first, second = (flights.depart(SchedulerOutput(tick)) for tick in (1, 2))
    first.result = RunnerOutput(tick=1, seconds=2.0)
    now[0] = 12.5
    assert [landing.began for landing in flights.land()] == [10.0]
    second.result = RunnerOutput(tick=2, seconds=3.0)
    now[0] = 16.0
    assert [landing.began for landing in flights.land()] == [12.5]
