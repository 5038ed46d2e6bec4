"""``steploom serve`` on a tiny Wan: the file is the engine's own video, and jobs outlive a server that is killed."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy
import openai
import psutil
import pytest
import tiny

from steploom import DiffusionEngine, media

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore:The Sora API")]
PROMPT = "two boats"
SERVE = [sys.executable, "-m", "steploom", "serve", "--port", "0", "--engine", "torch_threads=1"]
ASKED: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 3, "fps": 8}
QUICK = {"poll_interval_ms": 100}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models") / "boats"
    tiny.wan().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(model: pathlib.Path, folder: pathlib.Path, *options: str) -> Iterator[tuple[Any, openai.OpenAI]]:
    """The server's process once it says that it is ready, and a client of it."""
    command = [*SERVE, str(model), "--video-dir", str(folder), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if "is ready at" in line:
                    break
            address = re.search(r"http://\S+", said[-1])
            assert address is not None, said
            yield process, openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
        finally:
            process.kill()


def frames_of(data: bytes) -> list[Any]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


def apart(one: Any, other: Any) -> float:
    """How far two videos are from each other, on average, in brightness: colours are stored for blocks of pixels."""
    grey, unlike = (numpy.stack(video).astype(float).mean(axis=-1) for video in (one, other))
    return float(numpy.abs(grey - unlike).mean())


def test_the_file_is_the_engines_own_video(wan: pathlib.Path, tmp_path: pathlib.Path) -> None:
    own = {name: value for name, value in ASKED.items() if name != "fps"}
    with DiffusionEngine(model=str(wan), distributed_executor_backend="inproc", torch_threads=1) as engine:
        size = {"width": 64, "height": 32, "num_frames": 9}
        alone = engine.generate(PROMPT, **own, **size)
        other = engine.generate(PROMPT, **{**own, "seed": 4}, **size)
    alone.save(tmp_path / "alone.mp4", frame_rate=8)
    with served(wan, tmp_path / "videos") as (_, client):
        video = client.videos.create_and_poll(prompt=PROMPT, seconds="1", size="64x32", extra_body=ASKED, **QUICK)  # type: ignore[arg-type]
        assert (video.status, video.seconds, video.size, video.error) == ("completed", "1", "64x32", None)
        made = frames_of(client.videos.download_content(video.id).content)
    (raw,), (unlike,) = media.frames_of(alone.videos), media.frames_of(other.videos)
    assert len(made) == len(raw) == 9  # 8 frames are no 4k + 1
    assert apart(made, frames_of((tmp_path / "alone.mp4").read_bytes())) < 1
    assert 1.5 * apart(made, raw) < apart(made, unlike)


def test_jobs_outlive_a_server_that_is_killed(wan: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder, size = tmp_path / "videos", {"width": 32, "height": 32, "num_frames": 5}
    long = {**size, "num_inference_steps": 300, "seed": 1}
    with served(wan, folder) as (process, client):
        done = client.videos.create_and_poll(prompt=PROMPT, extra_body={**ASKED, **size}, **QUICK)  # type: ignore[arg-type]
        data = client.videos.download_content(done.id).content
        cut = client.videos.create(prompt=PROMPT, extra_body=long)
        while client.videos.retrieve(cut.id).status == "queued":
            pass
        waits = client.videos.create(prompt=PROMPT, extra_body={**ASKED, **size})
        worker = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        psutil.wait_procs(worker, 20)
    with served(wan, folder, "--drain-timeout", "0.1") as (process, client):
        assert [video.id for video in client.videos.list(order="asc")] == [done.id, cut.id, waits.id]
        assert client.videos.download_content(done.id).content == data
        assert client.videos.poll(waits.id, **QUICK).status == "completed"
        # The same request: the same video.
        assert apart(frames_of(client.videos.download_content(waits.id).content), frames_of(data)) < 1
        assert client.videos.retrieve(cut.id).status == "in_progress"
        process.send_signal(signal.SIGTERM)  # and now it is left to the next one
        assert process.wait(60) == 0
    with served(wan, folder) as (process, client):
        client.videos.delete(done.id)
        assert client.videos.poll(cut.id, **QUICK).status == "completed"
        assert client.videos.retrieve(cut.id).created_at == cut.created_at
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not list((folder / "files").glob(f"{done.id}*"))


def test_a_folder_that_is_in_use_is_one_line(wan: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with served(wan, tmp_path / "videos"):
        command = [*SERVE, str(wan), "--video-dir", str(tmp_path / "videos")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "another server keeps its videos there" in done.stderr
    assert "Traceback" not in done.stderr
