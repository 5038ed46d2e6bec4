"""A workload in a form that belongs to no engine: a JSON file that any driver can run. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

_THINGS = ("lighthouse", "tram", "fox", "teapot", "orchard", "bicycle", "harbour", "violin", "owl", "bridge")
_MANNERS = ("at dawn", "in the rain", "as a woodcut", "from above", "in winter", "seen through glass")


@dataclasses.dataclass(frozen=True)
class Item:
    """One request.

    Attributes:
        id: Unique in the workload.
        prompt: What to draw.
        seed: ``torch.Generator("cpu").manual_seed(seed)``.
        steps: ``num_inference_steps``.
        width: Pixels.
        height: Pixels.
        arrival_s: Seconds after the start of the workload.
        negative_prompt: None leaves it out.
        arguments: Further arguments under diffusers' names (``guidance_scale``, ``true_cfg_scale``).
    """

    id: str
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    arrival_s: float = 0.0
    negative_prompt: str | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(path: Path) -> list[Item]:
    """Reads a workload: ``{"requests": [{"id": ..., "prompt": ...}, ...]}``."""
    return [Item(**entry) for entry in json.loads(path.read_text())["requests"]]


def save(items: list[Item], path: Path) -> None:
    """Writes a workload."""
    path.write_text(json.dumps({"requests": [dataclasses.asdict(item) for item in items]}, indent=1) + "\n")


def make(
    count: int, *, steps: int, sizes: list[int], rate: float = 0.0, arguments: dict[str, Any] | None = None,
    negative_prompt: str | None = None, seed: int = 0,
) -> list[Item]:  # fmt: skip
    """``count`` requests whose sizes take turns.

    Args:
        count: Of requests.
        steps: Of each.
        sizes: Heights and widths in pixels.
        rate: Requests a second, Poisson; 0: all at once.
        arguments: Further arguments of each.
        negative_prompt: Of each.
        seed: Of prompts and arrivals.
    """
    draw, at, items = random.Random(seed), 0.0, []
    for place in range(count):
        size = sizes[place % len(sizes)]
        prompt = f"a {draw.choice(_THINGS)} {draw.choice(_MANNERS)}, number {place}"
        items.append(Item(f"r{place}", prompt, place, steps, size, size, at, negative_prompt, dict(arguments or {})))
        at += draw.expovariate(rate) if rate else 0.0
    return items
