"""The command line on the built-in model, as a user runs it."""

from __future__ import annotations

import functools
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
from PIL import Image

from steploom.worker import __main__ as worker

STEPLOOM = [sys.executable, "-m", "steploom"]
PROMPT = "a large red circle above a small blue square on a white background"
QUICK = ["--set", "max_sequence_length=16"]

pytestmark = pytest.mark.timeout(300)


def steploom(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*STEPLOOM, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def test_generate_leaves_an_image_and_a_sheet_of_its_steps(tmp_path: pathlib.Path) -> None:
    done = steploom(
        "generate", PROMPT, "-o", "a.png", "--steps", "6", "--seed", "1", "--save-steps", *QUICK, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"a\.png  64x64, seed 1, 6 steps in [\d.]+ s", done.stdout)
    assert "a-steps.png  6 steps" in done.stdout
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64)
        assert max(high - low for low, high in image.getextrema()) > 50


@pytest.mark.slow
def test_an_argument_that_the_pipeline_does_not_know_is_one_line(tmp_path: pathlib.Path) -> None:
    done = steploom("generate", PROMPT, "--set", "guidence_scale=3", "--backend", "inproc", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("steploom:")]
    assert "guidence_scale" in line
    assert "guidance_scale" in line
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    command = [*STEPLOOM, "generate", PROMPT, "--steps", "1000", "--verbose", "--save-steps", *QUICK]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("is loaded; 1 requests start" in line for line in process.stderr)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert rest.splitlines()[-1] == "steploom: interrupted"
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_ctrl_c_while_it_starts_is_one_line(tmp_path: pathlib.Path, delay: float) -> None:
    command = [*STEPLOOM, "generate", PROMPT, *QUICK]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, "steploom: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_images_of_one_request_are_saved(tmp_path: pathlib.Path) -> None:
    rows = ["--set", "num_images_per_prompt=3"]
    done = steploom("generate", PROMPT, "-o", "a.png", "--steps", "2", "--seed", "1", *rows, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a-1.png", "a-2.png", "a-3.png"]
    assert len({file.read_bytes() for file in files}) == 3


@pytest.mark.slow
def test_verify_finds_the_built_in_model_equal_and_batched(tmp_path: pathlib.Path) -> None:
    done = steploom("verify", "demo", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^✓ equal to pipe\(\.\.\.\) alone: [\d.e-]+ of the scale", done.stdout, re.M)
    assert re.search(r"^✓ batched: (8|9|10)\d%? of the denoiser calls carried both", done.stdout, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "no_such=1"], "no_such"),
        (["--device", "bogus"], "device='bogus'"),
    ],
)
def test_verify_complains_in_one_line(tmp_path: pathlib.Path, arguments: list[str], words: str) -> None:
    done = steploom("verify", "demo", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("steploom:")]
    assert words in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_leaves_images_sheets_and_figures(tmp_path: pathlib.Path) -> None:
    done = steploom("demo", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("[01]*.png"))) == 12
    for sheet in ("all.png", "steps.png"):
        with Image.open(tmp_path / "out" / sheet) as image:
            assert image.width > 800
    shared = re.search(r"on average ([\d.]+) requests shared a forward", done.stdout)
    assert shared is not None
    assert float(shared[1]) > 4
    difference = re.search(r"images: (\d+) of 255", done.stdout)
    assert difference is not None
    assert int(difference[1]) <= 1


@pytest.mark.slow
def test_doctor_draws_with_each_executor(tmp_path: pathlib.Path) -> None:
    done = steploom("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"executor mp .* drew an image", done.stdout)
    assert re.search(r"executor inproc .* drew an image", done.stdout)


@pytest.mark.slow
def test_a_closed_standard_input_is_no_fault(tmp_path: pathlib.Path) -> None:
    """As a service manager may leave it. The first socket of the event loop took its number, and ended the process."""
    command = [*STEPLOOM, "generate", PROMPT, "-o", "a.png", "--steps", "1", "--backend", "inproc", *QUICK]
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(command)} <&-"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "64x64" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_nothing_takes_the_place_of_a_standard_stream_that_is_closed(tmp_path: pathlib.Path, closed: str) -> None:
    look = (
        "import os, pathlib, sys; from steploom.streams import open_those_that_are_closed as opened; opened();"
        "print('said'); print('complained', file=sys.stderr); sys.stdin.read();"
        "at = os.open('file', os.O_CREAT | os.O_RDWR);"
        "said = [os.path.samestat(os.fstat(place), os.stat(os.devnull)) for place in range(3)];"
        "pathlib.Path('seen').write_text(f'{at > 2} {said} {[os.get_inheritable(place) for place in range(3)]}')"
    )
    command = shlex.join([sys.executable, "-c", look])
    subprocess.run(["sh", "-c", f"exec {command} {closed}"], cwd=tmp_path, input=b"", capture_output=True, check=True)
    gone = ["<&-" in closed, closed != "<&-", "2>&-" in closed]
    assert (tmp_path / "seen").read_text() == f"True {gone} {[True] * 3}"


def test_a_worker_opens_them_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.streams, "open_those_that_are_closed", functools.partial(sys.exit, "opened"))
    monkeypatch.setattr(worker, "keep_freed", functools.partial(sys.exit, "too late"))
    monkeypatch.setattr(sys, "argv", ["worker", "nowhere"])
    with pytest.raises(SystemExit, match="opened"):
        worker.main()
