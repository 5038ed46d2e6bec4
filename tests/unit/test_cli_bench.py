"""``steploom bench tick``: the parts of a tick add up, and nothing stays wrapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from steploom.cli.benches import bench
from steploom.cli.main import main
from steploom.config import EngineConfig
from steploom.protocol import NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.weave import program
from steploom.worker.runner import Runner
from steploom.worker.tick_profile import IDLE, PARTS, SWITCHING, TickProfile


def request(seed: int) -> NewRequest:
    asked = DiffusionRequest(prompt="a", seed=seed, num_inference_steps=3, width=32, height=32, output_type="latent")
    return NewRequest(run_id=f"{seed}#0", request=asked)


def test_the_profile_of_a_tick_counts_every_part_once():
    resume = program.Program.resume
    runner = Runner.from_pipeline(tiny.sd3(), EngineConfig(model="demo"))
    profile = TickProfile()
    runner.execute(SchedulerOutput(tick=1, scheduled_new_reqs=[request(1), request(2)]))
    profile.start_profile()
    took = [runner.execute(SchedulerOutput(tick=2, scheduled_cached_reqs=["1#0", "2#0"])).seconds]
    took.append(runner.execute(SchedulerOutput(tick=3, scheduled_cached_reqs=["1#0", "2#0"])).seconds)
    found = profile.stop_profile()
    assert found["ticks"] == 2
    assert found["rows"] == 4
    seconds: dict[str, float] = found["seconds"]
    assert seconds.keys() == {*PARTS, SWITCHING, IDLE}
    inside = sum(s for part, s in seconds.items() if part not in (IDLE, "protocol"))
    assert inside == pytest.approx(sum(took), rel=0.2)
    assert all(seconds[part] > 0 for part in ("forward", "merge and split", "signature", "noise scheduler", "pipeline"))
    assert program.Program.resume is resume
    assert sum(length for _, _, length in found["slices"]) == pytest.approx(sum(seconds.values()))


def test_what_is_printed_is_made_of_what_was_measured():
    seconds = {"forward": 0.4, "pipeline": 0.1, IDLE: 0.3}
    spans = [(0.25, 0.2, 0.15, True), (0.35, 0.3, 0.25, False)]
    figures = bench.summary({"seconds": seconds, "ticks": 2, "rows": 8}, spans)
    assert figures["requests_per_tick"] == 4
    assert figures["ms_per_tick"] == pytest.approx({"forward": 200, "pipeline": 50, "engine": 50, IDLE: 100})
    assert figures["steady_outside_ms"] == pytest.approx(50)


@pytest.mark.slow
def test_bench_tick_prints_figures_and_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "trace.json"
    arguments = ["bench", "tick", "--requests", "2", "--steps", "3", "--size", "32", "--json", "--trace", str(file)]
    assert main(arguments) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert figures["ticks"] >= 3
    assert figures["ms_per_tick"]["forward"] > 0
    events = json.loads(file.read_text())["traceEvents"]
    assert {"forward", "pipeline", "protocol"} <= {event["name"] for event in events}
