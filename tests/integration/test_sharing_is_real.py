"""``mean_batch_requests`` is recomputed from the real module's forwards: it cannot be a number that we made up."""

from __future__ import annotations

import anyio
import pytest
import tiny

from steploom import AsyncDiffusionEngine

TEXT = {"height": 32, "width": 32, "max_sequence_length": 16, "output_type": "latent"}


@pytest.mark.parametrize("steps", [[5] * 6, [3, 4, 5, 6, 7, 8]], ids=["equal", "mixed"])
async def test_mean_batch_requests_equals_what_the_forward_saw(steps):
    pipe = tiny.sd3()
    requests_per_forward: list[int] = []
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=8) as engine:
        outputs = {}

        async def one(name: int, count: int) -> None:
            outputs[name] = await engine.generate(f"prompt {name}", seed=name, num_inference_steps=count, **TEXT)

        async def all_of(counts: list[int]) -> None:
            async with anyio.create_task_group() as group:
                for i, count in enumerate(counts):
                    group.start_soon(one, i, count)

        await all_of(steps)  # probing and verification call the module too
        # Two rows a request, under guidance.
        spy = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: requests_per_forward.append(len(kwargs["hidden_states"]) // 2), with_kwargs=True
        )
        await all_of(steps)
        spy.remove()
    assert sum(requests_per_forward) == sum(steps), "every step of every request is in exactly one forward"
    # A forward of n requests is counted by each of them as n: the sums over requests and over forwards agree.
    counted = sum(out.timings.mean_batch_requests * out.timings.steps for out in outputs.values())
    assert counted == pytest.approx(sum(n * n for n in requests_per_forward))
    assert max(requests_per_forward) == len(steps)
