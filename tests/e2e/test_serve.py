"""``steploom serve`` as a process on the built-in model, and OpenAI's client."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import openai
import psutil
import pytest
from PIL import ImageChops
from serving import image_of

from steploom import DiffusionEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPT = "a large red circle above a small blue square on a white background"
ASKED = {"num_inference_steps": 6, "guidance_scale": 4.0, "seed": 3}
SERVE = [sys.executable, "-m", "steploom", "serve", "--port", "0", "--engine", "torch_threads=1"]


@contextlib.contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """The server's process once it says that it is ready, and a client of it."""
    with subprocess.Popen([*SERVE, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if "is ready at" in line)
            address = re.search(r"http://\S+", ready)
            assert address is not None
            yield process, openai.OpenAI(base_url=f"{address[0]}/v1", api_key="secret", max_retries=0)
        finally:
            process.kill()


def test_the_served_image_is_the_engines_own_and_a_signal_drains(tmp_path: pathlib.Path) -> None:
    with DiffusionEngine(model="demo", distributed_executor_backend="inproc", torch_threads=1) as engine:
        alone = engine.generate(PROMPT, **ASKED).images[0]
    with served("--api-key", "secret", "--served-model-name", "shapes") as (process, client):
        worker = psutil.Process(process.pid).children(recursive=True)
        assert [model.id for model in client.models.list()] == ["shapes"]
        events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=ASKED))
        last = image_of(events[-1].b64_json)
        assert max(high for _, high in ImageChops.difference(last, alone).getextrema()) <= 1
        assert [event.step for event in events] == [1, 4, 6]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        longer = {"num_inference_steps": 30}
        stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=longer)
        next(iter(stream))  # it runs
        process.send_signal(signal.SIGTERM)
        assert [event.type for event in stream][-1] == "image_generation.completed"
        assert process.wait(60) == 0
        assert not any(one.is_running() for one in worker)


def test_what_cannot_be_served_is_one_line() -> None:
    for options, why in (
        (["--api-key-file", "nowhere"], "nowhere"),
        (["./nowhere"], "model_index.json"),
        (["--port", "70000"], "65535"),
        (["demo", "--model", "demo"], "leave one out"),
        (["--engine", "dtype=float8"], "dtype"),
    ):
        done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (1, 2), done.stderr
        assert why in done.stderr
        assert "Traceback" not in done.stderr


def test_the_last_words_are_json_too(tmp_path: pathlib.Path) -> None:
    for options, why in (
        (["--profile", str(tmp_path / "nowhere" / "trace.json")], "--profile"),
        (["--host", "203.0.113.1"], "--host"),
        (["--model", "nowhere:make"], "nowhere"),
    ):
        command = [*SERVE, "--log-format", "json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        last = [json.loads(line) for line in done.stderr.splitlines()][-1]
        assert (done.returncode, last["level"]) == (1, "critical")
        assert why in last["message"]
