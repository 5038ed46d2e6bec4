"""A profiling pass: what ticks of some sizes cost, measured before anybody asks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio

from steploom.config import EngineConfig
from steploom.config.values import sizes
from steploom.errors import ConfigError, RequestError
from steploom.sched import Cost

STEPS = 4
"""Of each request: the first ones of a kind are warm-up, and do not count."""

Generate = Callable[..., Coroutine[Any, Any, Any]]


async def profile(
    generate: Generate, costs: Callable[[], list[Cost]], config: EngineConfig, tell: Callable[[str], None] | None
) -> None:
    """Runs 1, 2, 4... requests of each size of ``config.profile`` at a time, up to the knee or a full batch.

    Args:
        generate: The engine's.
        costs: What it has learned.
        config: Its settings.
        tell: Is told what runs.

    Raises:
        ConfigError: The model does not take such requests.
    """
    for width, height in sizes(config.profile or ""):
        count, before = 1, 0
        while count > before and not (before and costs() and costs()[-1].knee):
            if tell is not None:
                tell(f"profiling {width}x{height}, {count} at a time")
            try:
                await _together(generate, count, {"width": width, "height": height, "num_inference_steps": STEPS})
            except* RequestError as faults:
                why = f"a request of {width}x{height} failed: {faults.exceptions[0]}"
                raise ConfigError(f"profile={config.profile!r}: {why}") from None
            count, before = min(2 * count, config.batch_limit), count


async def _together(generate: Generate, count: int, arguments: dict[str, int]) -> None:
    async with anyio.create_task_group() as group:
        for seed in range(count):
            group.start_soon(partial(generate, "a photo", seed=seed, output_type="latent", **arguments))
