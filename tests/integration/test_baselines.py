"""The baselines of ``benchmarks/latency.py``, over a pipeline that only notes how it was called."""

from __future__ import annotations

import pathlib
import types
from typing import Any

import anyio
import pytest

from steploom.cli.benches.load import Load
from steploom.cli.benches.targets import Asking
from steploom.cli.benches.workloads import Arrival

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
ARRIVALS = [Arrival(0, 32, 32, 4), Arrival(0, 64, 64, 9), Arrival(0, 32, 32, 4), Arrival(0, 32, 32, 5)]


class Pipe:
    """Is called; ``calls`` has the pipeline, and what it was given."""

    def __init__(self, scheduler: Any, tokenizer: Any, calls: list[Any]) -> None:
        self.components = {"scheduler": scheduler, "tokenizer": tokenizer, "calls": calls}

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(self, **given: Any) -> None:
        if given["num_inference_steps"] == 13:
            raise ValueError("thirteen")
        self.components["calls"].append((self, given))


def prompts_of(given: dict[str, Any]) -> list[str]:
    return given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import baselines

    return baselines


def pipe() -> Pipe:
    return Pipe(["scheduler"], ["tokenizer"], [])


@pytest.mark.parametrize("name", ["Locked", "Pool", "StaticBatches"])
async def test_each_request_runs_once_with_its_own_prompt_seed_and_failure(baselines, name: str):
    asking, own = Asking(seed=4, params={"guidance_scale": 3.0}), pipe()
    async with getattr(baselines, name)(own, asking) as target:
        load = Load(target, [*ARRIVALS, Arrival(0, 32, 32, 13)])
        await load.run()
    calls = [given for _, given in own.components["calls"]]
    assert {one.index: one.error for one in load.outcomes} == {**dict.fromkeys(range(4)), 4: "ValueError: thirteen"}
    assert sorted(p for given in calls for p in prompts_of(given)) == sorted(asking.prompt_of(i) for i in range(4))
    seeds = [g.initial_seed() for given in calls for g in
             (given["generator"] if isinstance(given["generator"], list) else [given["generator"]])]  # fmt: skip
    assert sorted(seeds) == sorted(asking.seed_of(i) for i in range(4))
    assert all(given["guidance_scale"] == 3.0 for given in calls)
    batched = [sorted(prompts_of(given)) for given in calls if len(prompts_of(given)) > 1]
    together = [] if name != "StaticBatches" else [sorted(asking.prompt_of(i) for i in (0, 2))]
    assert batched == together


async def test_a_pool_copies_what_has_state_and_shares_the_rest(baselines):
    own = pipe()
    target = baselines.Pool(own, Asking(), workers=1)
    await Load(target, ARRIVALS[:2]).run()
    (first, _), (second, _) = own.components["calls"]
    assert first is not second
    parts = [one.components for one in (own, first, second)]
    assert len({id(part["scheduler"]) for part in parts}) == 3  # of each request
    assert parts[0]["tokenizer"] is not parts[1]["tokenizer"]  # of each thread
    assert parts[1]["tokenizer"] is parts[2]["tokenizer"]


async def test_static_batches_are_bounded_and_the_oldest_shape_is_next(baselines):
    own = pipe()
    async with baselines.StaticBatches(own, Asking(), most=2) as target, anyio.create_task_group() as group:
        for index, steps in enumerate((4, 9, 4, 4, 9)):
            group.start_soon(target.send, index, Arrival(0, 32, 32, steps))
    calls = [(given["num_inference_steps"], len(prompts_of(given))) for _, given in own.components["calls"]]
    assert calls == [(4, 2), (9, 2), (4, 1)]


def test_medians_over_rounds_and_ratios_inside_them(baselines):
    import latency_summary

    def row(met: float, mean: float, **more: Any) -> dict[str, Any]:
        return {"slo_attainment": met, "mean_e2el_ms": mean, **more}

    rounds = {
        "0": {"w1 0.9": {"lock": row(0.4, 100.0), "mp": row(0.9, 50.0, mean_rows=3.0)},
              "burst": {"mp": [{"last_image_s": 1.2, "seconds": 1.0, "with_encode_s": 1.2}]}},
        "1": {"w1 0.9": {"lock": row(0.6, 400.0), "mp": row(0.9, 80.0, mean_rows=5.0)}},
        "2": {"w1 0.9": {"lock": row(0.5, 100.0)}},
    }  # fmt: skip
    found = latency_summary.summary(rounds)
    lock, mp = found["w1 0.9"]["lock"], found["w1 0.9"]["mp"]
    assert (lock["rounds"], lock["slo_attainment"], lock["mean_e2el_of_locks"]) == (3, 0.5, 1)
    assert mp["attainment_of_locks"] == pytest.approx((0.9 / 0.4 + 0.9 / 0.6) / 2)
    assert mp["mean_e2el_of_locks"] == pytest.approx((0.5 + 0.2) / 2)
    assert mp["mean_rows"] == 4
    assert found["burst"]["mp"] == pytest.approx({"last_image_s": 1.2, "of_ceiling": 1.2, "of_ceiling_with_encode": 1})
