"""``steploom bench serve`` and ``throughput``: over a pretended engine, over HTTP, and against a real server."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from serving import listening

from steploom.cli.benches.http_post import Address
from steploom.cli.benches.load import Load
from steploom.cli.benches.targets import Asking, ServerTarget
from steploom.cli.benches.workloads import Arrival, w4
from steploom.cli.main import main
from steploom.engine import async_engine
from steploom.engine.observer import EngineObserver
from steploom.errors import ConfigError
from steploom.server import create_app
from steploom.testing import FakeEngine

SERVE = ["bench", "serve", "--seed", "3", "--alone", "1", "--warm-up", "1"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Engines of the command are pretended; those that were made."""
    made: list[FakeEngine] = []

    class Made(FakeEngine):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(async_engine, "AsyncDiffusionEngine", Made)
    return made


def test_serve_prints_a_table_and_writes_json(pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "figures.json"
    argv = [*SERVE, "--workload", "W1", "--requests", "20", "--rate", "2000", "--max-batch", "4", "--json", str(file)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "Successful requests:                    20\n" in out
    assert {"32x32", "48x48", "64x64", "96x96"} == found["by_class"].keys()
    assert (found["completed"], found["failed"], found["num_prompts"]) == (20, 0, 20)
    assert (found["policy"], found["max_batch"]) == (pretended[0].config.policy, 4)
    assert found["request_rate"] == 2000
    assert found["mean_rows"] >= found["mean_batch_requests"] >= 1
    assert found["slo_multiple"] == 5
    assert {"request_throughput", "request_goodput", "mean_e2el_ms", "p99_e2el_ms", "slo_attainment", "duration",
            "p99_join_delay_steps_slot_free", "mean_slowdown", "serial_capacity", "load"} <= found.keys()  # fmt: skip


@pytest.mark.parametrize("workload", ["poisson", "gamma", "burst", "w2", "W3", "W4", "trace"])
def test_every_workload_can_be_served(pretended, workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,user,num_inference_steps,num_images,status\n0,ann,3,1,SUCCEED\n5,bob,6,2,SUCCEED\n")
    argv = [*SERVE, "--workload", workload, "--requests", "6", "--json", "-", "--trace", str(trace)]
    rate = [] if workload in ("burst", "W4") else ["--rate", "900"]
    assert main([*argv, *rate, "--previews"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 6
    assert found["mean_ttfp_ms"] > 0
    if workload in ("W3", "trace"):
        assert found["by_user"].keys() == {"ann", "bob"}
        assert found["by_class"].keys() == {"32x32", "64x64"}


def test_the_load_is_a_share_of_what_one_at_a_time_allows(pretended, capsys: pytest.CaptureFixture[str]):
    assert main([*SERVE, "--requests", "8", "--load", "0.5", "--json", "-", "--steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"] == pytest.approx(0.5)
    assert found["request_rate"] == pytest.approx(0.5 * found["serial_capacity"])


def test_failures_are_counted_and_the_exit_code_says_if_all_did(pretended, capsys: pytest.CaptureFixture[str]):
    argv = [*SERVE, "--alone", "0", "--warm-up", "0", "--rate", "900", "--requests", "3", "--prompt", "fail please"]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "Failed requests:                        3\n" in out
    assert "3 x GenerationFailed: ValueError: fail please" in out


def test_throughput_beside_one_at_a_time(pretended, capsys: pytest.CaptureFixture[str]):
    argv = ["bench", "throughput", "--requests", "9", "--steps", "2", "--baseline", "--baseline-requests", "3"]
    assert main([*argv, "--concurrency", "4", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["max_concurrent_requests"]) == (9, 4)
    assert found["gain"] == pytest.approx(found["image_throughput"] / found["baseline_image_throughput"])
    assert found["mean_rows"] == pytest.approx(2 * found["mean_batch_requests"], rel=0.3)
    assert main(argv) == 0
    assert "Gain over one at a time:" in capsys.readouterr().out


def test_ctrl_c_prints_what_there_is_so_far(pretended, monkeypatch, capsys: pytest.CaptureFixture[str]):
    made = Load.__init__

    def interrupting(self: Load, *args: Any, on_change: Any = None, **settings: Any) -> None:
        def changed(load: Load) -> None:
            on_change(load)
            if len(load.outcomes) == 2:
                signal.raise_signal(signal.SIGINT)

        made(self, *args, on_change=changed, **settings)

    monkeypatch.setattr(Load, "__init__", interrupting)
    trace = ["--rate", "0.1", "--cv", "0", "--workload", "gamma", "--requests", "3"]
    monkeypatch.setattr("steploom.cli.benches.workloads.gamma", lambda *_: [0.0, 0.0, 3600.0])
    assert main([*SERVE, *trace]) == 130
    out, err = capsys.readouterr()
    assert "(interrupted)" in out
    assert "Successful requests:                    2\n" in out
    assert err.endswith("steploom: interrupted\n")


@pytest.mark.parametrize(("argv", "said"), [
    (["--rate", "1", "--load", "1"], "give one of them"),
    (["--alone", "0"], "give --rate instead"),
    (["--workload", "W3"], "needs --trace FILE"),
    (["--workload", "trace", "--trace", "absent.csv"], "absent.csv: cannot be read"),
    (["--json", "no/such/folder.json"], "--json no/such/folder.json"),
    (["--plain", "--steps", "3"], "OpenAI has no such fields"),
    (["--url", "ftp://x"], "must be http://HOST:PORT"),
    (["--max-batch", "0"], "max_batch=0"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(pretended, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "serve", *argv]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "throughput", "--url", "http://127.0.0.1:9", "--requests", "2"]) == 1
    assert capsys.readouterr().err.startswith("steploom: ")


async def test_a_server_is_measured_like_an_engine():
    async with FakeEngine() as engine, listening(create_app(engine, api_keys=["sesame"])) as address:
        arrivals = [Arrival(0, 32, 32, 3, 2, "ann", 1, 9.0), *w4(2, 48, 2)]
        seen = []
        engine.observers.append(_Spy(seen))
        for previews in (False, True):
            load = Load(ServerTarget(f"{address}/v1/", Asking(previews=previews), api_key="sesame"), arrivals)
            await load.run()
            assert [one.error for one in load.outcomes] == [None] * 3
            answers = {one.index: one.answer for one in load.outcomes}
            assert [answers[i].images for i in range(3)] == [2, 1, 1]
            assert all((one.first_preview_s is not None) == previews for one in load.outcomes)
        ann = [one for one in seen if one.user == "ann"]
        assert len(ann) == 4  # two images, twice
        assert {(one.priority, one.deadline, one.params["num_inference_steps"]) for one in ann} == {(1, 9.0, 3)}
        wrong = Load(ServerTarget(address, Asking()), w4(1, 32, 2))
        await wrong.run()
        assert wrong.outcomes[0].error.startswith("RequestError: 401 ")
        failing = Load(ServerTarget(address, Asking(prompt="fail", previews=True), api_key="sesame"), w4(1, 32, 4))
        await failing.run()
        assert "ValueError: fail" in failing.outcomes[0].error


class _Spy(EngineObserver):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen
        self.ended = anyio.Event()

    def on_queued(self, request: Any) -> None:
        self.seen.append(request)

    def on_end(self, *_: Any) -> None:
        self.ended.set()


async def test_giving_up_hangs_up():
    async with FakeEngine() as engine, listening(create_app(engine)) as address:
        engine.hold()
        spy = _Spy([])
        engine.observers.append(spy)
        load = Load(ServerTarget(address, Asking()), w4(1, 32, 2), timeout_s=0.2)
        await load.run()
        assert load.outcomes[0].error == "timeout: no answer within 0.2 s"
        await spy.ended.wait()  # though no tick goes on: the server has heard that its client is gone


ODD = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]": "not what an images API answers",
    b"HTTP/1.1 200 OK\r\n\r\n{}": "has no images",
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>": "502 <html>",
    b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n[1]": "closed the connection before its answer was complete",
    b"SSH-2.0-OpenSSH\r\n": "does not answer as an HTTP server does",
    b"": "closed the connection",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: [DONE]\n\n": "ended without an image",
}


CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9;x=y\r\n{"data": \r\n9\r\n[{}, {}]}\r\n0\r\n\r\n'


async def test_an_answer_in_chunks():
    (one,) = await answered(CHUNKED)
    assert (one.error, one.answer.images) == (None, 2)


@pytest.mark.parametrize(("answer", "said"), ODD.items())
async def test_answers_that_are_none(answer: bytes, said: str):
    (one,) = await answered(answer)
    assert said in one.error


async def answered(answer: bytes) -> list[Any]:
    """What a request comes to that a server answers so."""

    async def serve(stream: Any) -> None:
        async with stream:
            await stream.receive()
            await stream.send(answer)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        load = Load(ServerTarget(f"127.0.0.1:{port}", Asking()), w4(1, 32, 2))
        await load.run()
        group.cancel_scope.cancel()
    await listener.aclose()
    return load.outcomes


def test_addresses():
    for url, expected in {
        "http://h:1": ("h", 1, False, ""), "h:80": ("h", 80, False, ""), "https://h/a/v1/": ("h", 443, True, "/a"),
        "http://[::1]:5/": ("::1", 5, False, ""),
    }.items():  # fmt: skip
        found = Address(url)
        assert (found.host, found.port, found.tls, found.prefix) == expected
    for url in ("http://", "http://h:x", "file:///a"):
        with pytest.raises(ConfigError, match="url="):
            Address(url)
