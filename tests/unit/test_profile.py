"""The Chrome trace of ticks: it is what observers were told, and can be loaded whatever happens."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from typing import Any

import anyio
import pytest

from steploom import EngineObserver, GenerationFailed
from steploom.telemetry import ProfileObserver, trace_file
from steploom.testing import FakeEngine


class Ticks(EngineObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []
        self.steps: Counter[str] = Counter()

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        self.seen.append((output.tick, ended - began, sum(report.stepped for report in result.reports)))
        self.steps.update(report.run_id.partition("#")[0] for report in result.reports if report.stepped)


def loaded(path: pathlib.Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())
    assert all({"ph", "name", "pid", "tid", "ts"} <= event.keys() for event in events)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    return events


async def test_ticks_steps_and_phases_are_in_the_trace(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    async with FakeEngine(max_batch=2) as engine:
        with ProfileObserver(path) as profile:
            engine.observers += [profile, ticks := Ticks()]
            async with anyio.create_task_group() as group:
                for name, steps in (("a", 2), ("b", 4), ("c", 3)):
                    group.start_soon(lambda n=name, s=steps: engine.generate("x", request_id=n, num_inference_steps=s))
            with pytest.raises(GenerationFailed):
                await engine.generate("fail", request_id="d")
    events = loaded(path)
    shown = [(e["args"]["tick"], e["dur"], e["args"]["steps"]) for e in events if e["name"].startswith("tick ")]
    assert shown == [(tick, pytest.approx(seconds * 1e6, abs=0.01), steps) for tick, seconds, steps in ticks.seen]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    assert list(tracks) == ["a", "b", "c", "d"]
    outcomes = {}
    for name, track in tracks.items():
        own = [e for e in events if (e["pid"], e["tid"]) == (2, track)]
        steps = [e for e in own if e["name"].startswith("step ")]
        assert len(steps) == ticks.steps[name]
        phases = {e["name"]: e for e in own if e["ph"] == "X" and not e["name"].startswith("step ")}
        denoise = phases["denoise"]
        for step in steps:
            assert denoise["ts"] - 0.01 <= step["ts"]
            assert step["ts"] + step["dur"] <= denoise["ts"] + denoise["dur"] + 0.01
        instants = {e["name"]: e for e in own if e["ph"] == "i"}
        assert list(instants) == ["join", "leave"]
        assert instants["join"]["ts"] == pytest.approx(phases["encode"]["ts"])
        outcomes[name] = instants["leave"]["args"]["outcome"]
    assert outcomes == {"a": "completed", "b": "completed", "c": "completed", "d": "failed"}
    assert "x" not in {e["args"].get("name") for e in events}


def test_the_file_is_valid_after_each_write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "WRITE_EVERY_S", 3600)  # the test writes, instead of the thread
    path = tmp_path / "trace.json"
    with ProfileObserver(path) as profile:
        for written in range(1, 5):
            profile._name("thread_name", 2, written, "a")
            profile._file._write()
            assert len(loaded(path)) == 3 + written
        profile._file._write()
        assert len(loaded(path)) == 7
    assert len(loaded(path)) == 7


async def test_a_closed_profile_harms_nobody(tmp_path: pathlib.Path) -> None:
    async with FakeEngine() as engine:
        with ProfileObserver(tmp_path / "trace.json") as profile:
            engine.observers.append(profile)
            await engine.generate("a")
        profile.close()
        before = len(loaded(tmp_path / "trace.json"))
        await engine.generate("a")
    assert profile in engine.observers
    assert len(loaded(tmp_path / "trace.json")) == before


async def test_it_is_bounded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    async with FakeEngine() as engine:
        with ProfileObserver(path, max_events=20) as profile:
            engine.observers.append(profile)
            await engine.generate("a", num_inference_steps=50)
    events = loaded(path)
    assert 18 <= len(events) <= 20
    assert events[-1]["name"] == "the trace is full"
    monkeypatch.setattr(trace_file, "MOST_WAITING", 10)
    monkeypatch.setattr(trace_file, "WRITE_EVERY_S", 3600)  # a slow disk
    with ProfileObserver(path) as profile:
        for at in range(20):
            profile._instant("tick", profile.born(type("R", (), {"request_id": "a"}), at), at)
    events = loaded(path)
    assert events[-1]["name"].endswith("events dropped")
    assert len(events) <= 11


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        ProfileObserver(tmp_path / "nowhere" / "trace.json")
