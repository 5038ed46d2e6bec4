"""Models by their hub id: the real client of the hub, against a hub of one repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub

SCRIPT = """
import json, sys
from steploom import ConfigError, EngineConfig
from steploom.worker.runner import Runner

def load(**settings):
    lines = []
    try:
        Runner.load(EngineConfig(device="cpu", **settings), lines.append)
    except ConfigError as error:
        lines.append(str(error))
    return lines

print(json.dumps({
    "first": load(model="tiny/sd3", revision="v1"),
    "again": load(model="tiny/sd3", revision="v1", local_files_only=True),
    "offline": load(model="tiny/other", local_files_only=True),
    "none": load(model="tiny/none"),
    "revision": load(model="tiny/sd3", revision="v9"),
    "file": load(model="https://huggingface.co/tiny/sd3/blob/main/none.safetensors"),
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hub_id_is_downloaded_once_and_what_is_not_there_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with Hub({"tiny/sd3": tiny_model}).running() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    downloads = [line for line in said["first"] if line.startswith("downloading tiny/sd3: ")]
    assert downloads, said["first"]
    assert "100% of " in downloads[-1]
    assert said["first"][-1].startswith("moving StableDiffusion3Pipeline")
    assert said["again"][-1].startswith("moving StableDiffusion3Pipeline")
    assert not any(line.startswith("downloading") for line in said["again"])
    assert any(path.startswith("/tiny/sd3/resolve/") for path in hub.asked)
    assert said["offline"][-1].startswith("local_files_only=True: model='tiny/other' is not")
    assert said["none"][-1].startswith("model='tiny/none': the hub has no such model, or it is private")
    assert said["revision"][-1].startswith("revision='v9': model='tiny/sd3' has no such branch")
    assert "none.safetensors" in said["file"][-1]
