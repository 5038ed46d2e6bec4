"""The example scripts, as a reader runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(name: str, folder: Path) -> str:
    command = [sys.executable, EXAMPLES / f"{name}.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path))
    assert pixels.std() > 10
    return pixels


def test_generate(tmp_path: Path) -> None:
    said = run("generate", tmp_path)
    images = [picture(tmp_path / f"generate-{n}.png") for n in range(8)]
    assert len({image.tobytes() for image in images}) == 8
    assert "26 steps" in said
    assert "requests a forward" in said


def test_stream(tmp_path: Path) -> None:
    said = run("stream", tmp_path)
    assert "step 20 of 20" in said
    assert picture(tmp_path / "stream.png").shape[0] == 128


def test_cancel(tmp_path: Path) -> None:
    said = run("cancel", tmp_path)
    for line in ("left after step 3", "task.cancelled() is True", "DeadlineExceeded", "RequestCancelled"):
        assert line in said
    assert "requests left in the worker: 0" in said
    picture(tmp_path / "cancel.png")


def test_custom_executor(tmp_path: Path) -> None:
    said = run("custom_executor", tmp_path)
    ticks = [line for line in said.splitlines() if line.startswith("tick")]
    assert len(ticks) >= 10
    assert any(line.count("*") == 3 for line in ticks), "all three denoise in one tick"
    for name, steps in (("red", 4), ("yellow", 7), ("purple", 10)):
        assert sum(f"{name} *" in line or f"{name} d" in line or f"{name} ." in line for line in ticks) >= steps
        assert sum(f"{name} ." in line for line in ticks) == 1
        assert f"custom-executor-{name}.png  {steps} steps" in said
        picture(tmp_path / f"custom-executor-{name}.png")


def test_image_to_image(tmp_path: Path) -> None:
    said = run("image_to_image", tmp_path)
    assert "tasks: text-to-image, image-to-image\n" in said
    made = [picture(tmp_path / f"image-to-image-{name}.png") for name in ("strength-0.5", "strength-0.8", "from-text")]
    assert len({image.tobytes() for image in made}) == 3
    assert said.count("20 steps") == 3


def test_language_model_extension(tmp_path: Path) -> None:
    said = run("language_model_extension", tmp_path)
    assert "its own loop, in the worker: 16 tokens" in said
    assert "perhaps" in said
    for place in (0, 1):
        assert f"request {place} is done: " in said
