"""The figures of a load, by cases that were computed by hand; and the table that shows them."""

from __future__ import annotations

import json
import math

import numpy
import pytest

from steploom.cli.benches import bench_table
from steploom.cli.benches.figures import figures, percentile, plain
from steploom.cli.benches.load import Answer, Outcome
from steploom.cli.benches.standalone import Standalone, corners
from steploom.cli.benches.workloads import Arrival

SMALL, LARGE = Arrival(0.0, 32, 32, 4, user="ann"), Arrival(1.0, 64, 64, 10, user="bob")
ALONE = Standalone({(32, 32, 4, 1): 1.0, (64, 64, 10, 1): 2.0})


def outcome(index: int, arrival: Arrival, ended: float, error: str | None = None, **more) -> Outcome:
    answer = None if error else Answer(steps=arrival.steps, mean_batch_requests=more.pop("batch", None))
    due = arrival.at_s
    return Outcome(
        index=index, arrival=arrival, due_s=due, sent_s=due + 0.25, ended_s=ended, answer=answer, error=error, **more
    )


CASE = [
    outcome(0, SMALL, 2.0, batch=3.0, first_preview_s=1.5),  # takes 2, slowdown 2
    outcome(1, SMALL, 6.0, batch=1.0),  # takes 6, slowdown 6: missed
    outcome(2, LARGE, 9.0, batch=2.0),  # takes 8, slowdown 4
    outcome(3, LARGE, 3.0, "QueueFull: no"),
]


@pytest.mark.parametrize("share", [0, 5, 50, 95, 99, 100])
def test_percentiles_are_numpys(share: float):
    values = [5.0, 1.0, 4.0, 9.0, 2.5, 2.5, 7.0]
    assert percentile(values, share) == pytest.approx(numpy.percentile(values, share))
    assert percentile([3.0], share) == 3.0
    assert math.isnan(percentile([], share))


def test_a_case_by_hand():
    found = figures(CASE, 10.0, alone=ALONE, slo_multiple=5.0)
    assert (found["completed"], found["failed"], found["duration"]) == (3, 1, 10.0)
    assert found["request_throughput"] == pytest.approx(0.3)
    assert found["image_throughput"] == pytest.approx(0.3)
    assert found["step_throughput"] == pytest.approx((4 + 4 + 10) / 10)
    assert found["mean_e2el_ms"] == pytest.approx(1000 * 16 / 3)
    assert found["median_e2el_ms"] == pytest.approx(6000)
    assert found["p99_e2el_ms"] == pytest.approx(1000 * (6 + 0.98 * 2))
    assert found["max_e2el_ms"] == pytest.approx(8000)
    assert found["mean_ttfp_ms"] == pytest.approx(1500)
    assert found["mean_lateness_ms"] == pytest.approx(250)
    assert found["mean_batch_requests"] == pytest.approx((4 * 3 + 4 * 1 + 10 * 2) / 18)
    assert found["mean_slowdown"] == pytest.approx(4)
    assert found["slo_attainment"] == pytest.approx(2 / 4)  # who failed has not attained
    assert found["request_goodput"] == pytest.approx(0.2)
    assert found["errors"] == {"QueueFull: no": 1}


def test_by_class_and_by_user():
    found = figures(CASE, 10.0, alone=ALONE)
    assert list(found["by_class"]) == ["32x32", "64x64"]
    small, bob = found["by_class"]["32x32"], found["by_user"]["bob"]
    assert (small["completed"], small["slo_attainment"], small["mean_e2el_ms"]) == (2, 0.5, 4000)
    assert (bob["completed"], bob["failed"], bob["slo_attainment"]) == (1, 1, 0.5)
    nobody = figures([outcome(0, Arrival(0, 8, 8, 1), 1.0)], 1.0)
    assert nobody["by_user"] == {}
    assert "slo_attainment" not in nobody


def test_nothing_at_all_is_figures_too():
    found = figures([], 0.0, alone=ALONE)
    assert (found["completed"], found["mean_e2el_ms"], found["slo_attainment"]) == (0, None, None)
    json.dumps(plain({**found, "request_rate": math.inf, "deep": {"nan": math.nan}}), allow_nan=False)


def test_the_alone_times_of_all_are_told_by_the_corners():
    def cost(steps: int, images: int) -> float:
        return 1 + 2 * steps + 3 * images + 5 * steps * images

    requests = [Arrival(0, 32, 32, steps, images) for steps, images in ((4, 1), (10, 8), (7, 3), (20, 2))]
    requests.append(Arrival(0, 64, 64, 5))
    found = corners(requests)
    sizes = [(one.width, one.steps, one.images) for one in found]
    assert sizes == [(32, 4, 1), (32, 4, 8), (32, 20, 1), (32, 20, 8), (64, 5, 1)]
    alone = Standalone({(one.width, one.height, one.steps, one.images): cost(one.steps, one.images) for one in found})
    for one in requests:
        assert alone.seconds(one) == pytest.approx(cost(one.steps, one.images))
    assert alone.mean(requests[:2]) == pytest.approx((cost(4, 1) + cost(10, 8)) / 2)
    with pytest.raises(KeyError, match="96x96"):
        alone.seconds(Arrival(0, 96, 96, 4))


def test_the_table_has_vllms_words_and_leaves_out_what_nobody_knows():
    found = figures(CASE, 10.0, alone=ALONE)
    text = "\n".join(bench_table.lines({**found, "max_concurrency": None}, "Serving Benchmark Result"))
    for label, value in (("Successful requests", "3"), ("Failed requests", "1"), ("Benchmark duration (s)", "10.00"),
                         ("Request throughput (req/s)", "0.30"), ("Request goodput (req/s)", "0.20"),
                         ("Mean E2EL (ms)", "5333.33"), ("P99 TTFP (ms)", "1500.00"),
                         ("Attainment of 5 x standalone", "50.0%")):  # fmt: skip
        assert f"{label}:{value:>{len(value) + 39 - len(label)}}" in text
    assert "Maximum request concurrency" not in text
    assert "64x64" in text
    assert "1 x QueueFull: no" in text
    assert "(interrupted)" in bench_table.lines({**found, "interrupted": True}, "Result")[0]


def test_the_table_names_the_users_with_the_most_requests():
    many = [outcome(i, Arrival(0, 8, 8, 1, user=f"u{i % 30 if i < 60 else 29}"), 1.0) for i in range(90)]
    text = "\n".join(bench_table.lines(figures(many, 1.0), "Result"))
    assert "u29" in text
    assert "and 20 more" in text
