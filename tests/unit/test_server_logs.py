"""The server's log: one line for each request, with its ids, as text or as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from exposition import local
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from steploom.cli import loop, main
from steploom.cli.serving import serve
from steploom.server import create_app
from steploom.server.telemetry import beside, logs, otlp
from steploom.server.telemetry.record import RECORD, Record
from steploom.testing import FakeEngine

PATH = "/v1/images/generations"
BODY = {"prompt": "a secret hat", "num_inference_steps": 3}
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Log(io.StringIO):
    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == "steploom.access"]


@pytest.fixture
def log() -> Iterator[Log]:
    """What goes to the process's log, which is as it was afterwards."""
    root, log = logging.getLogger(), Log()
    handlers, level = root.handlers, root.level
    root.handlers, root.level = [logging.StreamHandler(log)], logging.WARNING
    names = ("steploom.access", "steploom.serve")
    try:
        yield log
    finally:
        root.handlers, root.level = handlers, level
        logging.captureWarnings(False)
        for name in names:
            logging.getLogger(name).setLevel(logging.NOTSET)


async def test_a_request_is_one_line_with_what_the_engine_did(log: Log) -> None:
    logs.configure("json")
    async with FakeEngine() as engine, local(create_app(engine)) as client:
        headers = {"x-request-id": "mine", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        answer = await client.post(PATH, json={**BODY, "n": 2}, headers=headers)
        assert answer.headers["x-request-id"] == "mine"
        other = await client.get("/v1/models")
        await client.get("/live")
    line, models = log.requests
    assert line.pop("time").endswith("Z")
    assert 0 <= line.pop("queued_s") < line.pop("seconds")
    assert line == {
        "level": "info", "logger": "steploom.access", "message": f"POST {PATH} 200", "method": "POST", "route": PATH,
        "status": 200, "outcome": "completed", "requests": 2, "steps": 6, "batch_requests": 2.0,
        "request_id": "mine", "trace_id": TRACE,
    }  # fmt: skip
    assert models["request_id"] == other.headers["x-request-id"]
    assert "outcome" not in models
    assert "hat" not in log.getvalue()


async def test_what_goes_wrong_says_so_without_a_prompt(log: Log) -> None:
    logs.configure("json")
    async with FakeEngine(max_waiting=1, max_batch=1, max_resident=1) as engine, local(create_app(engine)) as client:
        await client.post(PATH, json={**BODY, "prompt": "fail: a secret hat"})
        await client.post(PATH, json={**BODY, "width": 13})
        engine.hold()
        await client.post(PATH, json={**BODY, "timeout": 0.01})
        engine.release()
        await engine.generate("a")  # the tick that was held is over
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post(PATH, json=BODY))
            await engine.held()
            async with engine.stream("a"):
                await client.post(PATH, json=BODY)
            group.cancel_scope.cancel()
        engine.release()
    found = [(line["status"], line.get("outcome"), line["steps"], line.get("error"), line["level"]) for line in
             log.requests if "route" in line]  # fmt: skip
    assert found == [
        (500, "failed", 2, "ValueError", "warning"),
        (400, "invalid", 0, "InvalidRequest", "info"),
        (504, "timed_out", 0, "DeadlineExceeded", "warning"),
        (429, "refused", 0, "QueueFull", "info"),
        (499, "cancelled", 0, "RequestCancelled", "info"),
    ]
    assert "hat" not in log.getvalue()


async def test_a_request_of_the_application_has_a_line_of_its_own(log: Log) -> None:
    logs.configure("json")
    async with FakeEngine() as engine:
        create_app(engine)
        await engine.generate("a", request_id="own", num_inference_steps=3)
        asked = Record("asked")
        asked.ended = True  # a job's: it was answered long ago
        token = RECORD.set(asked)
        await engine.generate("a", request_id="job")
        RECORD.reset(token)
    line, job = log.requests
    assert (job["request_id"], job["engine_request_id"]) == ("asked", "job")
    assert (line["request_id"], line["outcome"], line["steps"]) == ("own", "completed", 3)
    assert line["seconds"] > 0


async def test_lines_within_a_request_carry_its_id(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("json")
    async with FakeEngine() as engine, local(create_app(engine)) as client:

        def broken() -> None:
            logging.getLogger("anybody").warning("about to break")
            raise ValueError("broken")

        monkeypatch.setattr(engine, "check_serving", broken)
        answer = await client.get("/ready", headers={"x-request-id": "mine"})
        assert answer.status_code == 500
    assert {line["request_id"] for line in log.lines} == {"mine"}
    warned, own, failed = sorted(log.lines, key=lambda line: "exception" in line)
    assert (warned["logger"], own["status"]) == ("anybody", 500)
    assert failed["exception"].endswith("ValueError: broken")
    assert RECORD.get() is None


async def test_an_id_that_cannot_be_logged_is_replaced(log: Log) -> None:
    logs.configure("text")
    async with FakeEngine() as engine, local(create_app(engine)) as client:
        for given in ("", "x" * 129, "a\tb"):
            answer = await client.get("/v1/models", headers={"x-request-id": given})
            assert answer.headers["x-request-id"].startswith("req_")
    assert len(log.getvalue().splitlines()) == 3
    assert all(" INFO steploom.access: GET /v1/models 200 " in line for line in log.getvalue().splitlines())


def test_whatever_is_logged_is_one_line_of_json(log: Log) -> None:
    logs.configure("json")
    anybody = logging.getLogger("uvicorn.error")
    anybody.warning("two\nlines", extra={"place": object(), "half": "\ud800", "number": float("nan"), "none": None})
    try:
        raise ValueError("a\nb")
    except ValueError:
        anybody.exception("%s of %d", "one", 2, stack_info=True)
    first, second = log.lines
    assert (first["message"], first["logger"], "none" in first) == ("two\nlines", "uvicorn.error", False)
    assert (second["message"], second["level"]) == ("one of 2", "error")
    assert "ValueError" in second["exception"]
    assert logs.writes_json()
    logs.configure("text")
    anybody.warning("plain", extra={"steps": 3, "_ray_timestamp_ns": 1})
    assert log.getvalue().endswith("WARNING uvicorn.error: plain steps=3\n")
    assert not logs.writes_json()


def test_a_collector_without_the_extra_is_told_and_none_is_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    assert otlp.set_up({}, 1.0) is None
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert otlp.set_up({**endpoint, "OTEL_SDK_DISABLED": "true"}, 1.0) is None
    assert log.getvalue() == ""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    assert otlp.set_up(endpoint, 1.0) is None
    assert "pip install 'steploom[otel]'" in log.getvalue()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in log.getvalue()


def all_end(patient: Callable[[], object], *hasty: Callable[[], object], go_on: Callable[[], object]) -> None:
    """The patient one begins to end first, and has not when two hasty ones have, in turn; then it may ``go_on``."""
    began = threading.Event()
    waits = threading.Thread(target=lambda: (began.set(), patient()), daemon=True)
    waits.start()
    began.wait()
    for one in hasty:
        one()
    assert waits.is_alive()
    go_on()
    waits.join(60)
    assert not waits.is_alive()


def test_the_end_waits_for_a_collector_that_hangs_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(BatchSpanProcessor, "shutdown", lambda processor: answers.wait(60))
    where = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    ends = [otlp.set_up(where, seconds) for seconds in (3600.0, 0.01, 0.01)]
    all_end(*(end for end in ends if end is not None), go_on=answers.set)


def test_the_end_waits_for_whoever_reads_the_log_no_longer_than_it_says(log: Log) -> None:
    """A pipe takes 64 kB; the rest of a line has to be read."""
    root = logging.getLogger()
    with contextlib.ExitStack() as files:
        readers: list[Any] = []
        ends: list[Callable[[], object]] = []
        for seconds in (3600.0, 0.01, 0.01):
            reads, writes = os.pipe()
            readers.append(files.enter_context(os.fdopen(reads)))
            root.handlers = [logging.StreamHandler(files.enter_context(os.fdopen(writes, "w")))]
            end = contextlib.ExitStack()
            end.enter_context(beside.written_beside(seconds))
            root.handlers[0].emit(logging.makeLogRecord({"msg": "x" * 200_000}))
            ends.append(end.close)
        all_end(*ends, go_on=lambda: [reader.read(200_001) for reader in readers])


def test_the_server_waits_at_its_ends_as_long_as_its_options_say(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    beside_it = beside.written_beside
    monkeypatch.setattr(serve, "_serve", lambda options, engine, settings, sockets: told.append(settings))
    monkeypatch.setattr(loop, "run", lambda _: 0)
    monkeypatch.setattr(otlp, "set_up", lambda env, last_s: told.append(last_s))
    monkeypatch.setattr(beside, "written_beside", lambda last_s: (told.append(last_s), beside_it(last_s))[1])
    words = ["--log-timeout", "3", "--span-timeout", "4", "--stream-silence", "5", "--scrape-timeout", "6"]
    assert main.main(["serve", "--port", "0", *words]) == 0
    log_s, span_s, settings = told
    assert (log_s, span_s, settings.stream_silence_s, settings.scrape_timeout_s) == (3, 4, 5, 6)


@pytest.mark.parametrize("kind", ["text", "json"])
def test_whoever_does_not_read_the_log_holds_up_nobody(kind: Any, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "MOST_LINES", 50)
    root = logging.getLogger()
    reads, writes = os.pipe()
    with os.fdopen(reads) as reader, os.fdopen(writes, "w") as writer:
        root.handlers = [logging.StreamHandler(writer)]
        logs.configure(kind)
        served = Record("mine")
        with beside.written_beside(60.0):
            token = RECORD.set(served)
            for number in range(200):  # 200 kB; a pipe takes 64
                logging.getLogger("steploom.access").info("line %d %s", number, "x" * 1000)
            RECORD.reset(token)
            assert logs.writes_json() == (kind == "json")
            first = reader.readline()
            assert "line 0 " in first
            assert "mine" in first
            assert any("lines were dropped" in line for line in reader)
        assert isinstance(root.handlers[0], logging.StreamHandler)
