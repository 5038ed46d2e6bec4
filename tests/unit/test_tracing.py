"""Spans of requests: parents, children, times, and nothing that is left open."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from exposition import local
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from steploom import GenerationFailed, QueueFull, RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput
from steploom.server import create_app
from steploom.telemetry import TracingObserver
from steploom.testing import FakeEngine

PHASES = ["queued", "encode", "denoise", "decode"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """An engine whose spans are kept."""

    def __init__(self, content: bool = False, **settings: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.engine = FakeEngine(**settings)
        self.observer = TracingObserver(self.provider, content=content)
        self.engine.observers.append(self.observer)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def request(self, request_id: str) -> tuple[ReadableSpan, dict[str, ReadableSpan]]:
        """A request's span, and its children by name."""
        (parent,) = [s for s in self.spans if (s.attributes or {}).get("steploom.request_id") == request_id]
        children = [s for s in self.spans if s.parent and s.parent.span_id == parent.context.span_id]
        assert all(child.context.trace_id == parent.context.trace_id for child in children)
        nested = [(parent.start_time, *(t for s in children for t in (s.start_time, s.end_time)), parent.end_time)]
        assert nested == [tuple(sorted(nested[0]))]  # one after the other, within the parent's time
        assert not self.observer._lives
        assert not self.observer._runs
        return parent, {child.name: child for child in children}


async def test_a_request_is_a_span_with_its_phases_as_children() -> None:
    traced = Traced(max_batch=2)
    async with traced.engine as engine:
        engine.hold()
        async with anyio.create_task_group() as group:
            for name, steps in (("a", 3), ("b", 5)):
                group.start_soon(lambda n=name, s=steps: engine.generate("hat", request_id=n, num_inference_steps=s))
            await engine.held()
            engine.release()
    parent, children = traced.request("b")
    assert (parent.name, list(children)) == ("steploom.request", PHASES)
    assert parent.status.status_code == StatusCode.UNSET
    assert parent.attributes == {
        "steploom.request_id": "b", "steploom.outcome": "completed", "steploom.steps": 5,
        "steploom.batch_requests.mean": pytest.approx((2 * 3 + 2) / 5),
    }  # fmt: skip
    assert parent.parent is None
    assert len(traced.spans) == 10
    assert "hat" not in "".join(span.to_json() for span in traced.spans)


async def test_the_time_of_a_tick_is_divided_as_the_worker_says(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced()
    async with traced.engine as engine:

        async def slowly(output: Any) -> RunnerOutput:
            await anyio.sleep(0.03)
            run = output.run_ids[0]
            spent = {"encode_s": 0.01, "denoise_s": 0.01, "decode_s": 0.005}
            report = RequestReport(run_id=run, phase="done", stepped=True, step=1, finished=True, output=1, **spent)
            return RunnerOutput(tick=output.tick, reports=[report])

        monkeypatch.setattr(engine._core.executor, "execute_step", slowly)
        await engine.generate("a", request_id="a")
    _, children = traced.request("a")
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in children.items()}
    assert seconds["encode"] == pytest.approx(0.01, abs=1e-4)
    assert seconds["denoise"] >= 0.015 - 1e-4
    assert seconds["decode"] >= 0.005 - 1e-4


async def test_what_fails_or_is_cancelled_ends_its_spans_too() -> None:
    traced = Traced(max_waiting=1, max_batch=1, max_resident=1)
    async with traced.engine as engine:
        with pytest.raises(GenerationFailed):
            await engine.generate("fail: a secret", request_id="failed")
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(cancelled, engine, "running")
            await engine.held()
            async with engine.stream("a", request_id="waiting"):
                with pytest.raises(QueueFull):
                    await engine.generate("a", request_id="refused")
            await engine.abort("running")
            engine.release()
        await engine.generate("a", request_id="last")  # the tick that the aborted one was in is over
    failed, children = traced.request("failed")
    assert list(children) == ["queued", "encode", "denoise"]
    assert failed.status.status_code == StatusCode.ERROR
    assert failed.attributes["steploom.outcome"] == "failed"
    assert failed.attributes["error.type"] == failed.status.description == "ValueError"
    for name, phases, outcome in (
        ("running", ["queued", "encode"], "cancelled"),
        ("waiting", ["queued"], "cancelled"),
        ("refused", [], "refused"),
    ):
        span, children = traced.request(name)
        assert list(children) == phases
        assert span.attributes["steploom.outcome"] == outcome
        assert span.status.status_code == StatusCode.ERROR
    assert "secret" not in "".join(span.to_json() for span in traced.spans)


async def cancelled(engine: FakeEngine, request_id: str) -> None:
    with pytest.raises(RequestCancelled):
        await engine.generate("a", request_id=request_id)


async def test_prompts_are_told_if_asked_for() -> None:
    traced = Traced(content=True)
    async with traced.engine as engine:
        with pytest.raises(GenerationFailed):
            await engine.generate("fail: a hat", request_id="a")
    span, _ = traced.request("a")
    assert span.attributes["steploom.prompt"] == "fail: a hat"
    assert span.status.description == "ValueError: fail: a hat"


async def test_a_lost_request_waits_again_in_the_same_span(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced()
    async with traced.engine as engine:
        execute, ticks = engine._core.executor.execute_step, []

        async def loses_all(output: Any) -> RunnerOutput:
            result = await execute(output)
            ticks.append(output.tick)
            if len(ticks) != 2:
                return result
            engine._core.executor._resident.clear()
            return RunnerOutput(tick=output.tick)

        monkeypatch.setattr(engine._core.executor, "execute_step", loses_all)
        await engine.generate("a", request_id="a", num_inference_steps=3)
    span, _ = traced.request("a")
    names = [child.name for child in traced.spans if child.parent]
    assert names == ["queued", "encode", "denoise", *PHASES]
    assert [event.name for event in span.events] == ["restarted"]
    assert (span.attributes["steploom.attempt"], span.attributes["steploom.steps"]) == (1, 3)


async def test_the_span_of_the_application_is_the_parent() -> None:
    traced = Traced()
    tracer = traced.provider.get_tracer("application")
    async with traced.engine as engine:
        with tracer.start_as_current_span("handler") as handler:
            await engine.generate("a", request_id="a")
    span, _ = traced.request("a")
    assert span.parent.span_id == handler.get_span_context().span_id


async def test_traceparent_is_taken_over() -> None:
    traced = Traced()
    body = {"prompt": "a", "n": 2, "num_inference_steps": 2}
    async with traced.engine as engine, local(create_app(engine)) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert (await client.post("/v1/images/generations", json=body, headers=headers)).status_code == 200
        continued = [span for span in traced.spans if span.name == "steploom.request"]
        assert [(f"{s.context.trace_id:032x}", f"{s.parent.span_id:016x}") for s in continued] == [(TRACE, PARENT)] * 2
        for wrong in ("00-" + "0" * 32 + f"-{PARENT}-01", "gibberish", ""):
            headers = {"traceparent": wrong} if wrong else {}
            assert (await client.post("/v1/images/generations", json=body, headers=headers)).status_code == 200
    fresh = [span for span in traced.spans if span.name == "steploom.request"][2:]
    assert len(fresh) == 6
    assert all(span.parent is None for span in fresh)


async def test_an_application_adds_no_second_tracer_and_costs_nothing_without_an_sdk() -> None:
    traced = Traced()
    create_app(traced.engine)
    create_app(traced.engine)
    assert sum(isinstance(observer, TracingObserver) for observer in traced.engine.observers) == 1
    async with FakeEngine() as engine:
        create_app(engine)
        (observer,) = [observer for observer in engine.observers if isinstance(observer, TracingObserver)]
        async with engine.stream("a"):
            assert not observer._lives
