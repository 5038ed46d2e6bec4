"""Metrics, spans, log and profile of the built-in model: what they say is what its outputs say."""

from __future__ import annotations

import contextlib
import http.server
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import anyio
import httpx2
import pytest
from exposition import Samples, counted, parsed
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from steploom import AsyncDiffusionEngine, DiffusionOutput
from steploom.protocol import WorkerStats
from steploom.telemetry import EngineMetrics, ProfileObserver, TracingObserver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_metrics_spans_and_profile_agree_with_the_outputs(tmp_path: pathlib.Path) -> None:
    exporter, provider, outputs = InMemorySpanExporter(), TracerProvider(), []
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = AsyncDiffusionEngine(model="demo", torch_threads=1, max_batch=2)
    with ProfileObserver(tmp_path / "trace.json") as profile:
        engine.observers += [metrics := EngineMetrics(engine), TracingObserver(provider), profile]

        async def draw(name: str, steps: int) -> None:
            outputs.append(await engine.generate("a red circle", request_id=name, num_inference_steps=steps, seed=1))

        async with engine:
            async with anyio.create_task_group() as group:
                for name, steps in (("a", 3), ("b", 6), ("c", 4)):
                    group.start_soon(draw, name, steps)
            await metrics.refresh(30)
            (stats,) = await engine.collective_rpc("stats")
            now = counted(metrics)
    metrics_agree(now, outputs, stats)
    for out in outputs:
        spans = exporter.get_finished_spans()
        (parent,) = [span for span in spans if span.attributes.get("steploom.request_id") == out.request_id]
        children = {span.name: span for span in spans if span.parent and span.parent.span_id == parent.context.span_id}
        assert list(children) == ["queued", "encode", "denoise", "decode"]
        assert seconds(children["queued"]) == pytest.approx(out.timings.queued_s, abs=0.01)
        assert seconds(parent) == pytest.approx(out.timings.total_s, abs=0.05)
        assert seconds(children["denoise"]) >= out.timings.denoise_s * 0.9
        assert seconds(children["decode"]) >= out.timings.decode_s - 0.001
        assert parent.attributes["steploom.batch_requests.mean"] == pytest.approx(out.timings.mean_batch_requests)
    events = json.loads((tmp_path / "trace.json").read_text())
    ticks = [event for event in events if event["name"].startswith("tick ")]
    assert sum(event["args"]["steps"] for event in ticks) == 13
    assert sum(event["args"]["forward_s"] for event in ticks) == pytest.approx(stats.forward_s, abs=1e-3)
    assert all(event["args"]["worker_s"] * 1e6 <= event["dur"] + 0.01 for event in ticks)  # microseconds, rounded


def seconds(span) -> float:
    return (span.end_time - span.start_time) / 1e9


def metrics_agree(now: Samples, outputs: list[DiffusionOutput], stats: WorkerStats) -> None:
    timings = [out.timings for out in outputs]
    assert now("steps_total") == sum(t.steps for t in timings) == now("step_seconds_count") == 13
    shared = sum(t.mean_batch_requests * t.steps for t in timings)
    assert now("step_batch_requests_sum") == pytest.approx(shared)
    assert now("step_batch_requests_sum") / 13 > 1.2
    for name in ("encode", "decode"):
        assert now(f"{name}_seconds_sum") == pytest.approx(sum(getattr(t, f"{name}_s") for t in timings))
        assert now(f"{name}_seconds_sum") > 0
    assert now("request_seconds_sum") == pytest.approx(sum(t.total_s for t in timings))
    assert now("queue_seconds_sum") == pytest.approx(sum(t.queued_s for t in timings), abs=0.01)
    assert now("ticks_total") == stats.ticks
    assert now("forward_seconds_total") == pytest.approx(stats.forward_s, abs=1e-3)
    assert now("encode_cache_hits_total") == stats.cache_hits > 0
    assert now("merged_calls_total") == stats.merged_calls > 0
    assert now("memory_bytes", worker="0", kind="host") > 50_000_000


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans as a collector does."""

    taken: list[bytes]

    def do_POST(self) -> None:
        self.taken.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *what: object) -> None:
        pass


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    kind = type("Own", (Collector,), {"taken": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", kind.taken
        finally:
            server.shutdown()
            thread.join()


def test_a_server_logs_traces_and_profiles(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    with collector() as (endpoint, taken):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        command = [sys.executable, "-m", "steploom", "serve", "--port", "0", "--engine", "torch_threads=1",
                   "--log-format", "json", "--profile", str(path)]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                lines = [json.loads(line) for line in iter_until(process.stderr, "is ready at")]
                address = re.search(r"http://\S+", lines[-1]["message"])
                assert address is not None
                now = ask(address[0])
                assert now("requests_total", outcome="completed") == 1  # without those that warmed it up
                assert now("steps_total") == 4
                process.send_signal(signal.SIGTERM)
                lines += map(json.loads, process.stderr)
                assert process.wait(60) == 0
            finally:
                process.kill()
    (line,) = [line for line in lines if line.get("route") == "/v1/images/generations"]
    assert (line["outcome"], line["steps"], line["trace_id"], line["request_id"]) == ("completed", 4, TRACE, "mine")
    assert b"steploom.request" in (spans := b"".join(taken))
    assert bytes.fromhex(TRACE) in spans
    assert spans.count(b"steploom.outcome") == 1
    events = json.loads(path.read_text())
    outcomes = [event["args"]["outcome"] for event in events if event["name"] == "leave"]
    assert outcomes == ["completed"] * 3


def iter_until(stream, text: str) -> Iterator[str]:
    for line in stream:
        yield line
        if text in line:
            return


def ask(address: str) -> Samples:
    body = {"prompt": "a red circle", "num_inference_steps": 4}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "mine"}
    httpx2.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=60).raise_for_status()
    return parsed(httpx2.get(f"{address}/metrics").text)
