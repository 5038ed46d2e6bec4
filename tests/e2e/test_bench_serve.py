"""``steploom bench serve`` and ``throughput`` against a real ``steploom serve``, each in processes of their own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPLOOM = [sys.executable, "-m", "steploom"]


def bench(*argv: str) -> dict[str, Any]:
    done = subprocess.run([*STEPLOOM, "bench", *argv, "--json", "-"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_real_server_under_load():
    serve = [*STEPLOOM, "serve", "--port", "0", "--engine", "torch_threads=1"]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if "is ready at" in line)
            address = re.search(r"http://\S+", ready)
            assert address is not None
            asked = ["--url", address[0], "--size", "32", "--steps", "2", "--warm-up", "2"]
            found = bench("serve", *asked, "--requests", "6", "--alone", "1", "--load", "2", "--previews")
            assert (found["completed"], found["failed"], found["backend"]) == (6, 0, "openai")
            assert 0 < found["mean_ttfp_ms"] <= found["mean_e2el_ms"]
            assert found["load"] == pytest.approx(2)
            assert bench("throughput", *asked, "--requests", "4")["completed"] == 4
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
