"""Models by their hub id: the real client of the hub, against a hub of one repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub

SCRIPT = """
import json, sys
from steploom import ConfigError, EngineConfig
from steploom.worker.runner import Runner

def load(component="transformer", **settings):
    lines = []
    try:
        runner = Runner.load(EngineConfig(device="cpu", **settings), lines.append)
        lines.append(type(getattr(runner.pipeline, component)).__name__)
    except ConfigError as error:
        lines.append(str(error))
    return lines

print(json.dumps({
    "first": load(model="tiny/sd3", revision="v1"),
    "again": load(model="tiny/sd3", revision="v1", local_files_only=True),
    "offline": load(model="tiny/other", local_files_only=True),
    "none": load(model="tiny/none"),
    "revision": load(model="tiny/sd3", revision="v9"),
    "tiny vae": load("vae", model="tiny/sd3", components={"vae": "tiny/taesd3"}),
    "own": load(model="tiny/sd3", components={"transformer": "tiny/own"}, trust_remote_code=True),
    "own, in a model": load(model="tiny/sd3", components={"transformer": "tiny/owns"}, trust_remote_code=True),
    "untrusted": load(model="tiny/sd3", components={"transformer": "tiny/own"}),
    "file": load(model="https://huggingface.co/tiny/sd3/blob/main/none.safetensors"),
}))
"""


CODE = """
from diffusers import SD3Transformer2DModel


class OwnTransformer(SD3Transformer2DModel):
    pass
"""


def others(model: Path, root: Path) -> dict[str, Path]:
    """Repositories of a component: one of diffusers' classes, one of a class of its own, and a model that has such."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=16).save_pretrained(root / "taesd3")
    own = shutil.copytree(model / "transformer", root / "own")
    (own / "own_transformer.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text()) | {"_class_name": "OwnTransformer"}
    config["auto_map"] = {"AutoModel": "own_transformer.OwnTransformer"}
    (own / "config.json").write_text(json.dumps(config))
    index = json.loads((model / "model_index.json").read_text())
    index["transformer"] = ["own_transformer", "OwnTransformer"]
    shutil.copytree(own, root / "owns" / "transformer")
    (root / "owns" / "model_index.json").write_text(json.dumps(index))
    return {f"tiny/{name}": root / name for name in ("taesd3", "own", "owns")}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hub_id_is_downloaded_once_and_what_is_not_there_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folders = {"tiny/sd3": tiny_model, **others(tiny_model, tmp_path / "others")}
    with Hub(folders).running() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    downloads = [line for line in said["first"] if line.startswith("downloading tiny/sd3: ")]
    assert downloads, said["first"]
    assert "100% of " in downloads[-1]
    assert said["first"][-2].startswith("moving StableDiffusion3Pipeline")
    assert said["again"][-2].startswith("moving StableDiffusion3Pipeline")
    assert not any(line.startswith("downloading") for line in said["again"])
    assert any(path.startswith("/tiny/sd3/resolve/") for path in hub.asked)
    assert said["offline"][-1].startswith("local_files_only=True: model='tiny/other' is not")
    assert said["none"][-1].startswith("model='tiny/none': the hub has no such model, or it is private")
    assert said["revision"][-1].startswith("revision='v9': model='tiny/sd3' has no such branch")
    assert said["tiny vae"][-1] == "AutoencoderTiny"
    assert said["own"][-1] == said["own, in a model"][-1] == "OwnTransformer"
    assert said["untrusted"][-1].startswith("trust_remote_code=False: components['transformer']='tiny/own' brings")
    assert "none.safetensors" in said["file"][-1]
