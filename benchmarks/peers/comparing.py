"""What the results of several peers say beside each other."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy


def figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one peer in one round: images a second, latencies in seconds, refusals by what they said."""
    done = [one for one in results if one["error"] is None]
    latencies = sorted(one["ended_s"] - one["due_s"] for one in done)
    span = max((one["ended_s"] for one in done), default=0.0) - min((one["due_s"] for one in done), default=0.0)
    return {
        "images_per_s": len(done) / span if done else 0.0,
        "mean_latency_s": statistics.mean(latencies) if done else None,
        "p95_latency_s": latencies[math.ceil(0.95 * len(latencies)) - 1] if done else None,
        "done": len(done),
        "refused": dict(Counter(one["error"] for one in results if one["error"] is not None)),
    }


def difference(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the latents from those of ``pipe(...)`` with the same seed: the largest, as a share of their scale."""
    by_id = {one["id"]: one["latents"] for one in expected}
    worst, compared, unlike = 0.0, 0, 0
    for one in results:
        if one["latents"] is None or by_id.get(one["id"]) is None:
            continue
        here, there = numpy.load(one["latents"]).squeeze(), numpy.load(by_id[one["id"]]).squeeze()
        if here.shape != there.shape:
            unlike += 1
            continue
        worst = max(worst, float(numpy.abs(here - there).max() / numpy.abs(there).max()))
        compared += 1
    return {"compared": compared, "of_other_shape": unlike, "worst": worst if compared else None}


def medians(rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the rounds of one peer; the gain over ``base`` is formed inside each round."""
    numbers = {
        name: [one[name] for one in rounds if one[name] is not None]
        for name in ("images_per_s", "mean_latency_s", "p95_latency_s")
    }
    pairs = [(one["images_per_s"], other["images_per_s"]) for one, other in zip(rounds, base, strict=False)]
    gains = [here / there for here, there in pairs if there]
    refused: Counter[str] = Counter()
    for one in rounds:
        refused.update(one["refused"])
    return {
        **{name: statistics.median(found) if found else None for name, found in numbers.items()},
        "gain": statistics.median(gains) if gains else None,
        "refused": dict(refused),
    }


def table(peers: dict[str, dict[str, Any]]) -> str:
    """One line a peer."""
    lines = [f"{'peer':>12}  images/s  times pipe(...)  mean latency  p95 latency  refused  from pipe(...)"]
    for name, one in peers.items():
        if "medians" not in one:
            lines.append(f"{name:>12}  {one['failed']}")
            continue
        m, worst = one["medians"], one.get("difference", {}).get("worst")
        cells = [
            _cell(m["images_per_s"], 8, ".2f"),
            _cell(m["gain"], 15, ".2f"),
            _cell(m["mean_latency_s"], 11, ".2f") + "s",
            _cell(m["p95_latency_s"], 10, ".2f") + "s",
            _cell(sum(m["refused"].values()), 7, "d"),
            _cell(worst, 14, ".1e"),
        ]
        lines.append("  ".join([f"{name:>12}", *cells]))
        lines += [f"{'':>14}refused {count} times: {text}" for text, count in m["refused"].items()]
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str) -> str:
    return "-".rjust(width) if value is None else format(value, form).rjust(width)


def folder_for(base: Path, peer: str, turn: int) -> Path:
    """Where a peer's latents of a round are kept."""
    folder = base / f"{peer}-{turn}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
