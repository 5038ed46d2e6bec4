"""What ticks cost, the knee, and what requests take: learned from the workers' answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from steploom.protocol import RequestReport, RunnerOutput
from steploom.requests import DiffusionRequest
from steploom.sched.cost_model import CostModel, cost_key
from steploom.sched.demand import Demands
from steploom.sched.state import RequestState, guess_key

H200 = {2: 0.167, 8: 0.240, 32: 0.832}


def tick(model: CostModel, rows: int, seconds: float, key: str | None = "transformer:64#1", **more: Any) -> None:
    report = RequestReport(run_id="a#1", batch_key="transformer:64#1", batch_requests=1, rows=rows)
    model.observe(key, RunnerOutput(tick=1, reports=[report], seconds=seconds, **more), rows)


def learned(points: dict[int, float], times: int = 20) -> CostModel:
    model = CostModel()
    for rows, seconds in points.items():
        for _ in range(times):
            tick(model, rows, seconds)
    return model


def test_the_cost_of_rows_that_were_not_measured_lies_between_and_beyond() -> None:
    model = learned({2: 1.0, 4: 1.5, 8: 3.5})
    assert [model.seconds("transformer:64#1", rows) for rows in (2, 3, 4, 6, 8, 10)] == [1.0, 1.25, 1.5, 2.5, 3.5, 4.5]
    assert 0 < (model.seconds("transformer:64#1", 1) or 0) <= 1.0
    assert model.seconds("unet:32#1", 2) is None


def test_outliers_do_no_harm() -> None:
    model = learned({2: 1.0})
    for _ in range(5):
        tick(model, 2, 60.0)
    for _ in range(40):
        tick(model, 2, 1.0)
    tick(model, 2, 60.0)
    assert model.seconds("transformer:64#1", 2) == 1.0


def test_warm_up_and_chores_are_no_cost_of_a_step() -> None:
    model = CostModel()
    tick(model, 2, 90.0, warmup_s=89.0)
    assert model.shown() == []
    tick(model, 2, 3.0, chores_s=2.0)
    (cost,) = model.shown()
    assert cost.seconds == {2: 1.0}
    assert cost.chores_s == 2.0


def test_a_tick_of_several_keys_teaches_nothing_and_a_key_that_is_new_is_found_in_the_answer() -> None:
    model = CostModel()
    reports = [RequestReport(run_id=f"{key}#1", batch_key=key, batch_requests=1, rows=2) for key in ("a#1", "b#1")]
    model.observe(None, RunnerOutput(tick=1, reports=reports, seconds=1.0), 4)
    assert model.shown() == []
    tick(model, 2, 1.0, key=None)
    assert [cost.batch_key for cost in model.shown()] == ["transformer:64"]


def test_the_running_number_of_a_key_is_of_one_process() -> None:
    assert cost_key("transformer:16x64#7") == cost_key("transformer:16x64#9") == "transformer:16x64"
    model = learned({2: 1.0})
    assert model.seconds("transformer:64#5", 2) == 1.0


@pytest.mark.parametrize(
    ("points", "knee"),
    [
        (H200, range(9, 15)),  # 90% of the best throughput: 5 to 6 guided requests of Qwen-Image at 512x512
        ({2: 1.0, 4: 1.96, 8: 3.9}, range(2, 3)),  # as at 1024x1024: nothing to gain
        ({2: 1.0, 4: 1.0, 8: 1.0}, None),  # still growing: nobody can say
        ({2: 1.0}, None),
        ({1: 1.0, 2: 1.02, 4: 1.05, 8: 2.1, 16: 4.2}, range(4, 5)),
    ],
)
def test_the_knee(points: dict[int, float], knee: range | None) -> None:
    found = learned({**points, 64: 64 * points[32] / 32} if points is H200 else points).knee("transformer:64#1")
    assert found is None if knee is None else found in knee


def test_while_nobody_knows_the_knee_more_rows_are_tried() -> None:
    model = learned({2: 1.0, 16: 1.0})
    assert model.cap("transformer:64#1") == 32
    assert model.cap("unet:32#1") == model.cap(None) == 1, "few before many, or nobody knows whether few are as good"


def test_another_process_goes_on_where_this_one_was() -> None:
    model = learned({**H200, 64: 1.664})
    tick(model, 2, 0.2, chores_s=0.05)
    other = CostModel()
    assert other.restore(json.loads(json.dumps(model.state())))
    assert other.shown() == model.shown()
    assert other.gain == model.gain


@pytest.mark.parametrize("state", [None, 3, [], {}, {"version": 0}, {"version": 1, "curves": {"a": 3}, "gain": [1, 1]}])
def test_a_state_that_cannot_be_read_changes_nothing(state: object) -> None:
    model = learned({2: 1.0})
    before = model.shown()
    assert not model.restore(state)
    assert model.shown() == before


def state_of(steps: int | None = 20, size: int | None = 512, **more: Any) -> RequestState:
    params = {} if size is None else {"width": size, "height": size}
    given = {} if steps is None else {"num_inference_steps": steps}
    request = DiffusionRequest("a cat", seed=1, **params, **given, **more)
    return RequestState(request, 0, 0.0, guess_key(request), "a#1")


def taught() -> Demands:
    demands = Demands(learned({2: 0.1, 4: 0.15}))
    report = RequestReport(run_id="a#1", batch_key="transformer:64#1", rows=2, total_steps=20)
    demands.learn(state_of(), report)
    return demands


def test_a_request_takes_its_steps_times_the_cost_of_its_rows() -> None:
    demands = taught()
    assert demands.standalone_s(state_of(20)) == pytest.approx(2.0)
    assert demands.standalone_s(state_of(40)) == pytest.approx(4.0)
    assert demands.standalone_s(state_of(20, num_images_per_prompt=2)) == pytest.approx(3.0)
    assert demands.steps(state_of(None)) == 20
    assert demands.steps(state_of(20, image="cat.png", strength=0.5)) == 10


def test_a_size_that_was_never_seen_is_estimated_from_the_nearest() -> None:
    demands = taught()
    assert demands.standalone_s(state_of(20, 1024)) == pytest.approx(2.0 * 4**1.2)
    nobody = Demands(CostModel())
    assert nobody.standalone_s(state_of(20, 512)) < nobody.standalone_s(state_of(20, 1024))


def test_what_is_left_of_a_request_shrinks_with_its_steps() -> None:
    demands, state = taught(), state_of(20)
    state.batch_key, state.total_steps, state.steps = "transformer:64#1", 20, 15
    alone, beside = demands.step_s(state), demands.step_s(state, company=2)
    assert (demands.remaining_s(state, alone), demands.remaining_s(state, beside)) == pytest.approx((0.5, 0.75))


def test_demands_go_on_in_another_process_and_odd_entries_are_left_out() -> None:
    demands = taught()
    other = Demands(demands.costs)
    other.restore([*json.loads(json.dumps(demands.state())), [1, 2], "x", ["g", True, "k", "many", 1, 1]])
    assert other.standalone_s(state_of(20)) == demands.standalone_s(state_of(20))
    other.restore(None)
