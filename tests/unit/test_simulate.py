"""The simulator of policies (``benchmarks/simulate.py``): costs, the virtual clock, figures, goodput, the document."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from steploom.cli.benches.workloads import Arrival
from steploom.config import EngineConfig

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import simulate  # noqa: E402
from simulation import costs, document, figures, goodput, picture  # noqa: E402
from simulation.costs import CostTable, ShapeCosts  # noqa: E402
from simulation.engine import Outcome, Run, Simulation  # noqa: E402
from simulation.scenario import Scenario  # noqa: E402
from simulation.study import Study, config_of  # noqa: E402

SMALL, LARGE = (64, 64), (96, 96)
TABLE = CostTable("test", {SMALL: ShapeCosts(((2, 1.0), (4, 1.5)), 0.25, 0.5), LARGE: ShapeCosts(((2, 3.0), (4, 6.0)))})
TRACE = """arrival_s,user,task,num_inference_steps,num_images,prompt_chars,negative_prompt_chars,num_loras,exec_s,status
0,ann,TXT_2_IMG,3,1,63,26,0,32.0,SUCCEED
7,bob,TXT_2_IMG,2,2,93,,0,43.0,SUCCEED
8,bob,TXT_2_IMG,9,1,93,,0,43.0,FAILED
9,ann,IMG_2_IMG,4,1,93,,0,36.0,SUCCEED
"""


def small(at_s: float = 0.0, steps: int = 2, **own: object) -> Arrival:
    return Arrival(at_s, *SMALL, steps, **own)


def simulated(arrivals: list[Arrival], policy: str = "fcfs", **own: object) -> Run:
    settings = own.pop("settings", {})
    return Simulation(arrivals, TABLE, config_of(policy, settings), **own).run()


def latencies(run: Run) -> list[float]:
    return [outcome.latency_s for outcome in run.outcomes]


def test_costs_are_linear_in_rows_and_go_on_by_the_last_slope() -> None:
    known = ShapeCosts(((2, 1.0), (4, 1.5), (8, 4.0)))
    assert [known.tick_s(rows) for rows in (1, 2, 3, 4, 6, 8, 10)] == [1.0, 1.0, 1.25, 1.5, 2.75, 4.0, 5.25]
    assert ShapeCosts(((2, 1.0),)).tick_s(6) == 3.0
    assert ShapeCosts(((2, 1.0), (4, 0.9))).tick_s(8) == 0.9


def test_the_built_in_costs_hold_what_was_measured() -> None:
    table = costs.h200()
    assert [table.tick_s((512, 512), rows) for rows in (2, 8, 32)] == pytest.approx([0.167, 0.240, 0.832])
    large = (1024, 1024)
    assert 2 * table.tick_s(large, 2) / table.tick_s(large, 4) == pytest.approx(1.02, abs=1e-4)
    for rows in (2, 4, 8, 16, 32):
        seconds = [table.tick_s(shape, rows) for shape in table.shapes]
        assert seconds == sorted(seconds)
    assert costs.load("demo-cpu").shapes.keys() == {(size, size) for size in (32, 48, 64, 96)}


def test_costs_are_read_from_json_and_csv(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(TABLE.as_json()))
    rows = "64,64,2,1.0,0.25,0.5,2\n64,64,4,1.5,0.25,0.5,2\n96,96,2,3,,,\n96,96,4,6,,,\n"
    (tmp_path / "a.csv").write_text("width,height,rows,seconds,encode_s,decode_s,rows_per_image\n" + rows)
    for name in ("a.json", "a.csv"):
        table = costs.load(str(tmp_path / name))
        assert (table.shapes, table.rows_per_image) == (TABLE.shapes, 2)
    with pytest.raises(costs.CostError, match=r"512x512.*64x64"):
        table.standalone_s(Arrival(0.0, 512, 512, 1))
    with pytest.raises(costs.CostError, match=r"missing\.json"):
        costs.load(str(tmp_path / "missing.json"))
    (tmp_path / "b.json").write_text('{"shapes": {"64x64": {"ticks": {"2": -1}}}}')
    with pytest.raises(costs.CostError, match="seconds above 0"):
        costs.load(str(tmp_path / "b.json"))


def test_a_case_by_hand() -> None:
    """Encoding takes 0.25 s, a step 1.0 s alone and 1.5 s for two, decoding 0.5 s."""
    assert latencies(simulated([small()])) == [0.25 + 2 * 1.0 + 0.5]
    # The second arrives in the first's only step alone, joins the second step, and steps once more by itself.
    run = simulated([small(), small(at_s=1.0)])
    assert latencies(run) == [1.25 + 0.25 + 1.5 + 0.5, 1.25 + 2.25 + 1.5 - 1.0]
    assert (run.ticks, run.requests, run.rows) == (3, 4, 8)
    # Behind the lock it waits for the whole first.
    assert latencies(simulated([small(), small(at_s=1.0)], "lock")) == [2.75, 2.75 + 2.75 - 1.0]


def test_what_is_said_of_a_run() -> None:
    outcomes = [Outcome(small(), 1.0, "finished", float(i)) for i in range(1, 101)]
    outcomes += [Outcome(small(), 1.0, "refused"), Outcome(dataclasses.replace(small(), deadline=9.0), 1.0, "failed")]
    seen = figures.figures(Run(outcomes, ticks=2, requests=6, rows=12, span_s=50.0))
    assert (seen.mean_s, seen.p50_s, seen.p95_s, seen.p99_s, seen.last_s) == (50.5, 50.0, 95.0, 99.0, 100.0)
    assert (seen.slowdown, seen.slowdown_p99, seen.mates, seen.rows, seen.per_s) == (50.5, 99.0, 3.0, 6.0, 2.0)
    assert (seen.refused, seen.failed, seen.attained) == (1, 1, pytest.approx(5 / 102))
    assert Outcome(dataclasses.replace(small(), deadline=9.0), 1.0, "finished", 8.0).attained(5.0)
    nothing = figures.figures(Run([Outcome(small(), 1.0, "refused")]))
    assert math.isnan(nothing.mean_s)
    assert nothing.as_json()["mean_s"] is None
    assert figures.medians([seen, seen, nothing]) == seen


def test_timeouts_are_hard_and_a_full_queue_refuses() -> None:
    run = simulated([small() for _ in range(4)], "lock", timeout=3.0)
    assert [outcome.ended for outcome in run.outcomes] == ["finished", "failed", "failed", "failed"]
    assert latencies(run) == [2.75, 3.0, 3.0, 3.0]
    run = simulated([small() for _ in range(4)], settings={"max_waiting": 3})
    assert [outcome.ended for outcome in run.outcomes] == ["finished"] * 3 + ["refused"]


@pytest.mark.parametrize("policy", simulate.known_policies())
@pytest.mark.parametrize("workload", ["W1", "W2", "W4"])
def test_every_request_has_one_outcome(policy: str, workload: str) -> None:
    scenario = Scenario(workload, costs.h200(), requests=120, warm_up=30)
    run = Study(timeout=90.0).run(scenario, policy, 1.05, seed=3)
    assert len(run.outcomes) == (24 if workload == "W4" else 120)
    for outcome in run.outcomes:
        assert outcome.ended in ("finished", "failed", "refused")
        assert outcome.ended != "finished" or outcome.latency_s >= outcome.standalone_s * (1 - 1e-9)
        assert outcome.latency_s <= 90.0 + 1e-9


def test_warm_up_does_not_count() -> None:
    scenario = Scenario("W1", costs.h200(), requests=40, warm_up=10)
    arrivals = scenario.arrivals(0.5, 1)
    run = Study().run(scenario, "fcfs", 0.5, 1)
    assert (len(arrivals), [outcome.arrival for outcome in run.outcomes]) == (50, arrivals[10:])
    work = sum(map(scenario.costs.standalone_s, arrivals))
    assert work / 50 * scenario.rate(0.5, 1) == pytest.approx(0.5)
    twice = [arrival.at_s / 2 for arrival in arrivals]
    assert [arrival.at_s for arrival in scenario.arrivals(1.0, 1)] == pytest.approx(twice)
    assert 0.3 < work / arrivals[-1].at_s < 0.8


def test_a_trace_is_replayed_with_its_users(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE)
    scenario = Scenario("W3", TABLE, (64, 96), requests=3, warm_up=0, trace=tmp_path / "t.csv")
    run = Study().run(scenario, "fcfs", 0.5, 0)
    assert [(o.arrival.user, o.arrival.steps, o.arrival.images) for o in run.outcomes] == [
        ("ann", 3, 1), ("bob", 2, 2), ("ann", 4, 1)
    ]  # fmt: skip
    assert figures.figures(run).users.keys() == {"ann", "bob"}
    with pytest.raises(ValueError, match="--trace"):
        Scenario("W3", TABLE).arrivals(1.0, 0)


def test_goodput_is_found_by_bisection() -> None:
    for edge in (0.03, 0.3, 0.5, 0.77, 5.0):
        load = goodput.highest_load(lambda load, edge=edge: 0.95 if load <= edge else 0.5, 0.9, 0.01)
        assert edge / 1.01 <= load <= edge
    assert goodput.highest_load(lambda load: 0.0) == 0.0
    assert goodput.highest_load(lambda load: 1.0) == goodput.MOST


def test_other_processes_find_the_same_figures(tmp_path: pathlib.Path) -> None:
    records = []
    for seed in ("1", "2"):
        file = tmp_path / f"{seed}.json"
        command = [sys.executable, str(BENCHMARKS / "simulate.py"), "--requests", "60", "--load", "0.7,1.05"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [*command, "--warm-up", "20", "--seeds", "2", "--json", str(file), "--jobs", seed],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert "W1 on h200, load 1.05" in done.stdout
        records.append(json.loads(file.read_text())["rows"])
    assert records[0] == records[1]
    assert {row["policy"] for row in records[0]} == set(simulate.known_policies())


@pytest.mark.slow
def test_the_document_is_generated_and_stays_the_same(tmp_path: pathlib.Path) -> None:
    (tmp_path / "images").mkdir()
    page = tmp_path / "policies.md"
    original = (document.DOCS / "policies.md").read_text()
    page.write_text(original)
    study = dataclasses.replace(Study(), seeds=1)
    document.write(page, None, study, requests=8)
    first = {path.name: path.read_text() for path in (page, *(tmp_path / "images").iterdir())}
    document.write(page, None, study, requests=8)
    assert first == {path.name: path.read_text() for path in (page, *(tmp_path / "images").iterdir())}
    assert first.keys() == {"policies.md", "sched-w1.svg", "sched-w2.svg", "sched-w4.svg"}
    text = first["policies.md"]
    for policy in simulate.known_policies():
        assert text.count(f"| `{policy}` |") >= 9
    kept = "<!-- simulate: W3 begin -->"
    assert text.partition(kept)[2].partition("##")[0] == original.partition(kept)[2].partition("##")[0]
    page.write_text("nothing")
    with pytest.raises(ValueError, match="simulate: W1 begin"):
        document.write(page, None, study, requests=8)


def test_a_picture_shows_every_policy_and_escapes_its_name() -> None:
    scenario = Scenario("W4", TABLE, (64,))
    rows = [Study().row(scenario, name, 1.0) for name in ("lock", "fcfs")]
    drawn = picture.picture([*rows, dataclasses.replace(rows[0], policy="a<b")], 5.0)
    assert drawn.count("<path") > 10
    assert "lock</text>" in drawn
    assert "a&lt;b</text>" in drawn


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--policy", "fastest"], "fastest"), (["--costs", "nowhere.json"], "nowhere.json"),
        (["--workload", "W9"], "W1, W2, W3, W4"), (["--shapes", "700"], "700x700"), (["--workload", "W3"], "--trace"),
        (["--set", "max_batch=0"], "max_batch"),
    ):  # fmt: skip
        assert simulate.main([*arguments, "--requests", "5", "--jobs", "1"]) == 2
        assert words in capsys.readouterr().err
    assert EngineConfig(policy="fcfs").scheduler == "step"
