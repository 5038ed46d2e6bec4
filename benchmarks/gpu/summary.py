"""The figures as a table to read, and where batching does not pay."""

from __future__ import annotations

from typing import Any

_HEAD = ("case", "knee", "ceiling", "gain", "share", "outside", "MFU", "join", "cancel", "gap quiet", "gap busy")


def summary(result: dict[str, Any]) -> str:
    """One line a case, each beside the ceiling of the same run; then what was left out."""
    lines = [_HEAD]
    pointless: list[str] = []
    for name, model in result["models"].items():
        for size, figures in model["sizes"].items():
            if "bare" in figures:
                lines.append(_line(f"{name} {size}", figures))
            if not figures.get("bare", {}).get("batching_pays", True):
                pointless.append(f"{name} at {size}x{size} (best gain {figures['bare']['best_gain']:.2f})")
    widths = [max(len(line[place]) for line in lines) for place in range(len(_HEAD))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append("knee: rows beyond which a row gets no more than 5% cheaper. ceiling to MFU: with the most requests")
    text.append("that were measured. join, cancel: ticks, of the worst. gap: longest tick over the median.")
    if pointless:
        text.append(f"batching does not pay, for throughput: {'; '.join(pointless)}")
    text += [f"left out: {one['case']}: {one['what']}: {one['why']}" for one in result.get("left_out", ())]
    return "\n".join(text)


def _line(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    engines = figures.get("engine") or {}
    most = max(engines, key=int, default=None)
    engine = engines[most] if most is not None else {}
    delays, gaps = figures.get("delays", {}), figures.get("gaps", {})
    mfu = figures.get("engine_mfu", {}).get(most)
    return (
        name,
        str(figures["bare"]["knee_rows"]),
        _number(engine.get("ceiling"), ".2f"),
        _number(engine.get("gain"), ".2f"),
        _number(engine.get("share_of_ceiling"), ".0%"),
        _number(engine.get("outside_share"), ".1%"),
        _number(mfu, ".0%"),
        _number(delays.get("join", {}).get("ticks", {}).get("worst"), ".0f"),
        _number(delays.get("cancel", {}).get("ticks_begun_with_it", {}).get("worst"), ".0f"),
        _gap(gaps.get("quiet", {})),
        _gap(gaps.get("busy", {})),
    )


def _gap(sides: dict[str, Any]) -> str:
    """Of the device where it was seen there, else of the engine."""
    side = sides.get("device", sides.get("engine", {}))
    return _number(side.get("longest_over_median"), ".2f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
