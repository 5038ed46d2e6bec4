"""Observers of an engine are told everything once, and cannot harm it."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from steploom import EngineObserver, InvalidRequest, QueueFull, RequestCancelled, SteploomError
from steploom.testing import FakeEngine


class Told(EngineObserver):
    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def on_queued(self, request):
        self.said.append(("queued", request.request_id))

    def on_refused(self, request, error):
        self.said.append(("refused", type(error)))

    def on_tick(self, output, result, began, ended):
        assert began <= ended <= time.monotonic()
        self.said.append(("tick", len(result.reports)))

    def on_end(self, request_id, output, error):
        self.said.append(("end", (request_id, output is not None, type(error))))


class Breaks(EngineObserver):
    def __init__(self) -> None:
        self.asked = 0

    def on_tick(self, output, result, began, ended):
        self.asked += 1
        raise ValueError("not mine")


async def test_an_observer_is_told_of_each_request_and_tick() -> None:
    engine = FakeEngine(max_waiting=1)
    engine.observers.append(told := Told())
    async with engine:
        await engine.generate("a", request_id="a", num_inference_steps=3)
        assert told.said == [("queued", "a"), *3 * [("tick", 1)], ("end", ("a", True, type(None)))]
        told.said.clear()
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(_cancelled, engine)
            await engine.held()
            with pytest.raises(QueueFull):
                async with engine.stream("b", request_id="b"), engine.stream("c"):
                    raise AssertionError("accepted")
            await engine.abort("x")
            engine.release()
        assert ("refused", QueueFull) in told.said
        ends = {said[1][0]: said[1][1:] for said in told.said if said[0] == "end"}
        assert ends == {"x": (False, RequestCancelled), "b": (False, RequestCancelled)}


async def _cancelled(engine: FakeEngine) -> None:
    with pytest.raises(RequestCancelled):
        await engine.generate("a", request_id="x")


async def test_an_observer_is_told_of_starts_decisions_and_what_is_refused_before_its_pictures_are_read() -> None:
    class Hears(EngineObserver):
        def __init__(self) -> None:
            self.said: list[Any] = []

        def on_start(self, info):
            self.said.append(info.pipeline_class)

        def on_refused(self, request, error):
            self.said.append((request.request_id, type(error)))

        def on_schedule(self, output, at):
            assert at <= time.monotonic()
            self.said.append(output.tick)

        def on_tick(self, output, result, began, ended):
            self.said.append(-output.tick)

    engine = FakeEngine()
    engine.observers.append(hears := Hears())
    assert not engine.serves
    async with engine:
        assert engine.serves
        for wrong in ({"height": "tall"}, {"task": "image-to-image", "image": b"no picture"}):
            with pytest.raises(InvalidRequest):
                await engine.generate("a", request_id="w", **wrong)
        engine.hold()
        async with engine.stream("a", num_inference_steps=2), engine.stream("b") as other:
            await engine.held()
            assert (engine.num_running, engine.num_waiting) == (2, 0)
            engine.release(1)
            await anext(other)
    assert hears.said[:5] == ["FakePipeline", ("w", InvalidRequest), ("w", InvalidRequest), 1, -1]
    assert (engine.num_running, engine.num_waiting, engine.serves) == (0, 0, False)


async def test_closing_tells_the_end_of_what_runs() -> None:
    engine = FakeEngine()
    engine.observers.append(told := Told())
    async with engine:
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(_ended, engine)
            await engine.held()
            await engine.close()
    assert told.said == [("queued", "a"), ("end", ("a", False, RequestCancelled))]


async def _ended(engine: FakeEngine) -> None:
    with pytest.raises(SteploomError):
        await engine.generate("a", request_id="a")


async def test_an_observer_that_raises_harms_nobody_and_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.observers += [breaks := Breaks(), told := Told()]
    async with engine:
        await engine.generate("a", num_inference_steps=3)
    assert breaks.asked == 1
    assert [said[0] for said in told.said].count("tick") == 3
    assert "not mine" in caplog.text
