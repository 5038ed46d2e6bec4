"""Every request that the OpenAPI document allows, and many that it does not: Schemathesis against a real server."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from steploom.server import create_app
from steploom.testing import FakeEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
    "ignored_auth",
]  # fmt: skip
"""All but ``positive_data_acceptance``: no schema says that 63 pixels are too odd, or which pictures are whole."""


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application in a thread of its own, which starts its engine too."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


CONFIG = """
[checks.not_a_server_error]  # a timeout of a nanosecond is allowed, and is over at once
expected-statuses = ["2xx", "3xx", "4xx", 504]
"""


@pytest.mark.parametrize("makes", ["images", "text", "videos"])
def test_whatever_is_sent_the_answer_is_as_described(tmp_path: Path, makes: str) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    engine = FakeEngine(makes=makes, max_pixels=128 * 128, max_steps=20)  # what is allowed is quick
    limits: dict[str, Any] = {"max_images": 3, "watcher_idle_s": 0.05}  # a stream of ticks is read to its end
    with serving(create_app(engine, api_keys=("k",), video_dir=str(tmp_path), **limits)) as address:
        run = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        done = subprocess.run(
            [*run, f"{address}/openapi.json", "-H", "Authorization: Bearer k", "--checks", ",".join(CHECKS),
             "--mode", "all", "--phases", "coverage,fuzzing", "--max-examples", "40", "--seed", "1",
             "--generation-deterministic", "--request-timeout", "30", "--continue-on-failure", "--no-color"],
            cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    selected, tested = (re.search(rf"{word}: +(\d+)", done.stdout) for word in ("Selected", "Tested"))
    assert selected is not None
    assert tested is not None
    assert selected[1] == tested[1]
