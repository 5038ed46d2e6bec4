"""Costs are kept for the next start: of the same model on the same device, whole or not at all."""

from __future__ import annotations

import json
import pathlib
import resource
from typing import Any

import pytest

from steploom.config import EngineConfig
from steploom.engine.costs_file import CostsFile, learned, teach
from steploom.protocol import PipelineInfo, RequestReport, RunnerOutput
from steploom.requests import DiffusionRequest
from steploom.sched import build_scheduler

INFO = PipelineInfo(pipeline_class="Pipeline", device_name="a GPU")


def scheduler(**config: Any) -> Any:
    return build_scheduler(EngineConfig(**config), lambda: 0.0)


def taught() -> Any:
    built = scheduler()
    built.add_request(DiffusionRequest("a", seed=1, request_id="a", width=512, height=512, num_inference_steps=9))
    output = built.schedule()
    report = RequestReport(
        run_id=output.run_ids[0], batch_key="transformer:64#0", batch_requests=1, rows=2, total_steps=9
    )
    built.update_from_output(output, RunnerOutput(tick=output.tick, reports=[report], seconds=0.5))
    return built


def test_what_was_learned_is_there_for_the_next_scheduler(tmp_path: pathlib.Path) -> None:
    file = CostsFile.of(EngineConfig(costs_file=str(tmp_path / "deep" / "costs.json")), INFO)
    assert file is not None
    assert file.read() is None
    first, second = taught(), scheduler()
    state = learned(first)
    assert state is not None
    file.write(state)
    teach(second, file.read())
    assert second.costs.shown() == first.costs.shown() != []
    assert second.demands.knows
    assert [path.name for path in file.path.parent.iterdir()] == ["costs.json"]
    assert learned(scheduler()) is None


def test_the_file_is_one_for_each_model_device_and_way_of_running(monkeypatch: Any, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    configs = [
        EngineConfig(),
        EngineConfig(model="some/folder/"),
        EngineConfig(compile=True),
        EngineConfig(torch_threads=1),
    ]
    infos = [INFO, PipelineInfo(pipeline_class="Pipeline", device_name="another GPU")]
    files = [CostsFile.of(config, info) for config in configs for info in infos]
    paths = {file.path for file in files if file is not None}
    assert len(paths) == 8
    assert all(path.is_relative_to(tmp_path / "steploom" / "costs") for path in paths)
    same = CostsFile.of(EngineConfig(max_batch=3, policy="srpt"), INFO)
    assert same == files[0]


@pytest.mark.parametrize("config", [{"costs_file": None}, {"distributed_executor_backend": "inproc"}])
def test_nothing_is_kept_if_not_wanted_or_if_nobody_can_say_of_what(config: dict[str, Any]) -> None:
    assert CostsFile.of(EngineConfig(**config), INFO) is None


@pytest.mark.parametrize("text", ["", "[1]", "{", json.dumps({"owner": {}, "costs": {}}), "\x00"])
def test_a_file_that_is_damaged_or_another_s_is_not_read_and_replaced(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    file = CostsFile.of(EngineConfig(costs_file=str(path)), INFO)
    assert file is not None
    assert file.read() is None
    built = scheduler()
    teach(built, file.read())
    teach(built, {"owner": file.owner, "costs": {"version": 1, "curves": 3}, "demands": 4})
    file.write(learned(taught()) or {})
    assert file.read() is not None


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: pathlib.Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    file = CostsFile.of(EngineConfig(costs_file=str(tmp_path / "file" / "costs.json")), INFO)
    assert file is not None
    file.write({})
    assert "are not kept" in caplog.text


def test_a_full_disk_keeps_what_was_there_and_no_halves(tmp_path: pathlib.Path, caplog: Any) -> None:
    """The kernel refuses for real: no file of this process may grow beyond so many bytes."""
    file = CostsFile(tmp_path / "costs.json", {"a": "b"})
    file.write({"costs": [1]})
    before = file.read()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 4096):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            file.write({"costs": list(range(50_000))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("are not kept") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    assert file.read() == before is not None
