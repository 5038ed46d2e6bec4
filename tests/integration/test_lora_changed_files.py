"""An adapter, once loaded, does not depend on its file any more: safetensors maps files into memory."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import lora_files
import pytest
import tiny
import torch
from driving import Driver, config, request

from steploom.worker.runner import Runner

TEXT: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
TRUNCATES = "import sys, test_lora_changed_files as own; own.changed(sys.argv[1], offloaded=False)"


def changed(folder: str, *, offloaded: bool, by: bytes = b"") -> tuple[Any, Any]:
    """Outputs of two equal requests, before the file is overwritten with ``by`` and across it."""
    pipe = tiny.sd3()
    if offloaded:
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    driver = Driver(Runner.from_pipeline(pipe, config(loras={"style": folder})))
    before = driver.drain([request("before", "x", 1, lora="style", **TEXT)])["before"].output
    driver.tick([request("across", "x", 1, lora="style", **TEXT)])
    (file,) = pathlib.Path(folder).iterdir()
    with file.open("r+b") as opened:
        opened.write(by)
        if not by:
            opened.truncate()
    across = driver.drain()["across"]
    assert across.error is None, across.error
    return before, across.output


@pytest.mark.parametrize("offloaded", [False, True], ids=["plain", "offloaded"])
def test_a_file_that_is_overwritten_meanwhile_changes_nothing(tmp_path: pathlib.Path, offloaded: bool):
    folder = lora_files.save(tiny.sd3, tmp_path / "style", 1, text=True)
    (file,) = pathlib.Path(folder).iterdir()
    before, across = changed(folder, offloaded=offloaded, by=b"\xff" * file.stat().st_size)  # all NaN
    assert torch.equal(torch.as_tensor(before[0]), torch.as_tensor(across[0]))


@pytest.mark.slow
def test_a_file_that_is_cut_off_meanwhile_does_not_end_the_process(tmp_path: pathlib.Path):
    folder = lora_files.save(tiny.sd3, tmp_path / "style", 1, text=True)
    ended = subprocess.run(
        [sys.executable, "-c", TRUNCATES, folder], env={"PYTHONPATH": ":".join(sys.path)}, check=False
    )
    assert ended.returncode == 0
