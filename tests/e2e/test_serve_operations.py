"""``steploom serve`` as a process, and what operators do to it: signals, ports, sockets, certificates, dead workers."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import queue
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SERVE = [sys.executable, "-m", "steploom", "serve", "--engine", "torch_threads=1"]


class Server:
    """A server's process."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()  # a full pipe would hold up the server

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in self.process.stderr:
                self.lines.put(line)

    def connection(self) -> http.client.HTTPConnection:
        if "://" not in self.address:
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(self.address)
            return connection
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme == "https":
            context = ssl._create_unverified_context()
            return http.client.HTTPSConnection(parts.hostname, parts.port, context=context)
        return http.client.HTTPConnection(parts.hostname, parts.port)

    def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, Any, str | None]:
        """Status, answer, and whether the connection is closed."""
        with contextlib.closing(self.connection()) as connection:
            head = {"content-type": "application/json", **headers} if body else headers
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, head)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.getheader("connection")

    def draws(self, steps: int) -> int:
        return self.ask("/v1/images/generations", {"prompt": "a red circle", "num_inference_steps": steps})[0]

    def until_running(self) -> None:
        while not any(entry["status"] == "running" for entry in self.ask("/v1/requests")[1]["data"]):
            pass

    def says(self, words: str) -> str:
        while words not in (line := self.lines.get(timeout=240)):
            pass
        return line


@contextlib.contextmanager
def served(*options: str) -> Iterator[Server]:
    with subprocess.Popen([*SERVE, "--port", "0", *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            server = Server(process, "")
            found = re.search(r"is ready at (\S+)", server.says("is ready at"))
            assert found is not None
            server.address = found[1]
            yield server
        finally:
            process.kill()


def test_the_first_signal_drains_and_answers_meanwhile() -> None:
    with served("--drain-timeout", "200") as server, ThreadPoolExecutor() as threads:
        running = threads.submit(server.draws, 60)
        server.until_running()
        server.process.send_signal(signal.SIGTERM)
        server.says("finishing 1 requests")
        assert server.ask("/live")[0] == 200
        assert server.ask("/ready")[:2] == (503, {"status": "not ready", "why": "draining"})
        status, answer, connection = server.ask("/v1/images/generations", {"prompt": "another"})
        assert (status, answer["error"]["code"], connection) == (503, "draining", "close")
        assert running.result() == 200
        assert server.process.wait(60) == 0


def test_a_second_signal_stops_now() -> None:
    with served("--drain-timeout", "200") as server, ThreadPoolExecutor() as threads:
        workers = psutil.Process(server.process.pid).children(recursive=True)
        running = threads.submit(server.draws, 1000)
        server.until_running()
        server.process.send_signal(signal.SIGTERM)
        server.says("finishing 1 requests")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM
        assert not any(worker.is_running() for worker in workers)
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert running.result() == 503


def test_the_time_to_drain_is_bounded() -> None:
    with served("--drain-timeout", "0.5") as server, ThreadPoolExecutor() as threads:
        running = threads.submit(server.draws, 1000)
        server.until_running()
        server.process.send_signal(signal.SIGINT)
        assert running.result() == 503
        assert server.process.wait(60) == 0


def test_a_dead_worker_shows() -> None:
    with served() as server:
        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()
        assert "worker 0 died with exit code -9" in server.says("is being replaced")
        status, answer, _ = server.ask("/ready")
        assert status == 503
        assert answer["why"] == "recovering: worker 0 died with exit code -9"  # and not what it had printed
        status, answer, _ = server.ask("/health")
        assert (status, answer["status"]) == (200, "recovering")
        assert (server.ask("/live")[0], server.draws(2)) == (200, 200)
        assert (server.ask("/ready")[0], server.ask("/health")[1]["status"]) == (200, "healthy")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_a_unix_socket_is_there_as_long_as_the_server(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place))
    with served("--uds", str(place), "--uds-mode", "600", "--root-path", "/images") as server:
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert server.ask("/v1/models")[0] == 200
        proxied = {"host": "a.example", "x-forwarded-proto": "https"}
        kept = {"prompt": "a", "size": "64x64", "num_inference_steps": 1, "response_format": "url"}
        status, answer, _ = server.ask("/v1/images/generations", kept, **proxied)
        assert (status, answer["data"][0]["url"].partition("/v1/")[0]) == (200, "https://a.example/images")
        other = subprocess.run([*SERVE, "--uds", str(place)], capture_output=True, text=True, timeout=120, check=False)
        assert (other.returncode, other.stderr.count("\n")) == (1, 1)
        assert "another program listens there" in other.stderr
        assert server.ask("/live")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert not place.exists()


def certificate(folder: pathlib.Path, name: str) -> tuple[str, str]:
    paths = [str(folder / f"{name}.{end}") for end in ("crt", "key")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-out", paths[0], "-keyout", paths[1],
                    "-subj", "/CN=localhost", "-days", "2"], check=True, capture_output=True)  # fmt: skip
    return paths[0], paths[1]


def test_tls_and_what_cannot_be_listened_at(tmp_path: pathlib.Path) -> None:
    (crt, key), (_, other) = certificate(tmp_path, "a"), certificate(tmp_path, "b")
    with served("--ssl-certfile", crt, "--ssl-keyfile", key) as server:
        assert server.address.startswith("https://")
        assert server.ask("/ready")[0] == 200
        port = server.address.rpartition(":")[2]
        for options, words in (
            (["--port", port], f"--port {port}: another program listens there"),
            (["--host", "203.0.113.7"], "--host 203.0.113.7: cannot listen there"),
            (["--uds", crt], "is a file, no socket"),
            (["--uds", "/nowhere/s"], "--uds /nowhere/s: cannot listen there"),
            (["--ssl-certfile", crt], "--ssl-certfile: needs --ssl-keyfile"),
            (["--ssl-keyfile", key], "--ssl-keyfile: needs --ssl-certfile"),
            (["--ssl-certfile", crt, "--ssl-keyfile", "nowhere"], "--ssl-keyfile nowhere: cannot be read"),
            (["--ssl-certfile", crt, "--ssl-keyfile", other], f"{other}: does not belong to --ssl-certfile {crt}"),
            (["--ssl-certfile", crt, "--ssl-keyfile", __file__], "are no certificate and its key"),
        ):
            done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=120, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert words in done.stderr


def test_a_signal_while_the_model_is_loaded_ends_it() -> None:
    with subprocess.Popen([*SERVE, "--port", "0", "-v"], stderr=subprocess.PIPE, text=True) as process:
        Server(process, "").says("Started server process")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
