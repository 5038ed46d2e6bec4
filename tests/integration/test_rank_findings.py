"""What a rank finds out for itself is not what it goes by: rank 0's finding is."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from driving import Driver, config, request
from test_weaving import TEXT

from steploom.worker.runner import Runner
from steploom.worker.tuning import keep_together


class Elsewhere:
    """Rank 1 of two, whose rank 0 finds everything the other way round."""

    index, size, store = 1, 2, ""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def meet(self) -> None: ...

    def settle(self, value: Any) -> Any:
        return not value if isinstance(value, bool) else "rank 0 says so"

    def fault(self, error: Exception) -> None:
        self.faults.append(str(error))


def test_kinds_skips_and_faults_are_settled_by_rank_0() -> None:
    pipe, rank = tiny.sd3(), Elsewhere()
    runner = Runner.from_pipeline(pipe, config())
    keep_together(runner._hub, runner._loom.shared, rank)
    driver = Driver(runner)
    driver.drain([request(name, name, 1, num_inference_steps=12, cache="easycache:9", **TEXT) for name in "ab"])
    assert {"rank 0 says so"} == set(runner.stats().kinds.values())
    assert driver.finished["a"].skipped_steps == 0, "nobody skips by its own finding"
    assert rank.faults == []
    bad = request("c", None, 1, prompt_embeds=torch.zeros(1, 16, 7), pooled_prompt_embeds=torch.zeros(1, 64),
                  negative_prompt_embeds=torch.zeros(1, 16, 7), negative_pooled_prompt_embeds=torch.zeros(1, 64),
                  height=32, width=32, num_inference_steps=2)  # fmt: skip
    driver.drain([bad])
    assert driver.finished["c"].error is not None
    assert len(rank.faults) == 1
