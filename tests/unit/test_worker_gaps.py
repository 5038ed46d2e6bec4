"""Gaps between ticks, by a clock of our own."""

from __future__ import annotations

import pytest

from steploom.worker import gaps as module
from steploom.worker.gaps import Gaps


def test_what_a_gap_is_and_what_of_it_was_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    gaps = Gaps()
    assert gaps.begin() == (0.0, 0.0), "nothing was resident before the first"
    gaps.end(busy=True)
    now[0] = 101.0
    since = now[0]
    now[0] = 103.0
    gaps.waited(since)
    now[0] = 103.5
    assert gaps.begin() == (3.5, 2.0)
    gaps.end(busy=True)
    since = now[0]
    now[0] = 110.0
    gaps.called(since)
    now[0] = 110.25
    assert gaps.begin() == (0.25, 0.0), "an RPC does not count"
    gaps.end(busy=False)
    now[0] = 200.0
    gaps.waited(110.25)
    assert gaps.begin() == (0.0, 0.0), "nobody waited for it"
    assert (gaps.gap_s, gaps.idle_s) == (3.75, 2.0)
