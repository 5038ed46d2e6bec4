"""One picture of a scenario: how late requests are under each policy, and who is in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from simulation.study import Row
from simulation.tables import share

COLOURS = {"lock": "#7a7a86", "fcfs": "#c9781a", "srpt": "#2f9e63", "deadline": "#2e7dd7"}
OTHERS = ("#8e5bc0", "#c23b5a", "#4d8f9e", "#99892b")
INK, PALE, GRID = "#33333b", "#6a6a74", "#dcd9d0"
WIDTH, HEIGHT = 980, 400
LEFT, RIGHT, TOP, BOTTOM = (64, 500), (570, 950), 100, 344
MOST = 100.0
"""The slowdown at the right edge."""
POINTS = 160


def picture(rows: Sequence[Row], slo: float) -> str:
    """SVG of the policies of one scenario at one load.

    Left: which share of the requests (refused ones among them) has a latency of at most so many times its standalone
    time. Right: which share was in time, of all and by size. It has a ground of its own, so it can be read on any page.
    """
    scenario = rows[0].scenario
    load = "" if scenario.bursts else f" at load {rows[0].load:g}"
    title = f"{scenario.workload}{load}, costs {scenario.costs.name}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Inter, Helvetica, Arial, sans-serif" role="img" aria-labelledby="t d">',
        f'<title id="t">{escape(title)}</title>',
        f'<desc id="d">{escape(_described(rows, slo))}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#fbfaf7"/>',
        _text(24, 30, title, size=16, weight=600, fill=INK),
        *_legend(rows),
        *_axes(slo),
        *(_curve(row, _colour(row, i)) for i, row in enumerate(rows)),
        *_bars(rows, slo),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _colour(row: Row, place: int) -> str:
    return COLOURS.get(row.policy) or OTHERS[place % len(OTHERS)]


def _described(rows: Sequence[Row], slo: float) -> str:
    seen = ", ".join(f"{row.policy} {share(row.figures.attained)}" for row in rows)
    return f"Requests within {slo:g} times their standalone time: {seen}."


def _text(x: float, y: float, words: str, *, size: float = 12, fill: str = PALE, anchor: str = "start",
          weight: int = 400) -> str:  # fmt: skip
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" stroke="{colour}" fill="none"{dashes}/>'


def _legend(rows: Sequence[Row]) -> list[str]:
    parts: list[str] = []
    x = 24.0
    for i, row in enumerate(rows):
        colour = _colour(row, i)
        parts.append(f'<rect x="{x:.1f}" y="44" width="14" height="10" rx="2" fill="{colour}"/>')
        words = row.policy.rpartition(".")[2]
        parts.append(_text(x + 20, 53.5, words, size=13, fill=INK))
        x += 46 + 7.2 * len(words)
    return parts


def _x(slowdown: float) -> float:
    return LEFT[0] + (LEFT[1] - LEFT[0]) * math.log(min(slowdown, MOST)) / math.log(MOST)


def _y(part: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * part


def _axes(slo: float) -> list[str]:
    parts: list[str] = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        for left, right in (LEFT, RIGHT):
            parts.append(_line(left, _y(part), right, _y(part)))
            parts.append(_text(left - 8, _y(part) + 4, f"{part:.0%}", anchor="end"))
    for tick in (1, 2, 5, 10, 20, 50, 100):
        parts.append(_line(_x(tick), BOTTOM, _x(tick), BOTTOM + 5, PALE))
        parts.append(_text(_x(tick), BOTTOM + 19, f"{tick}", anchor="middle"))
    parts.append(_line(_x(slo), TOP, _x(slo), BOTTOM, PALE, "4 4"))
    parts.append(_text((LEFT[0] + LEFT[1]) / 2, BOTTOM + 42, "latency / standalone time, at most", anchor="middle"))
    parts.append(_text(LEFT[0], TOP - 20, "requests"))
    parts.append(_text(RIGHT[0], TOP - 20, f"within {slo:g} times their standalone time (or their deadline)"))
    return parts


def _curve(row: Row, colour: str) -> str:
    outcomes = [outcome for run in row.runs for outcome in run.outcomes]
    slowdowns = sorted(outcome.slowdown for outcome in outcomes if outcome.ended == "finished")
    points: list[str] = []
    done = 0
    for i in range(POINTS + 1):
        slowdown = MOST ** (i / POINTS)
        while done < len(slowdowns) and slowdowns[done] <= slowdown * (1 + 1e-9):
            done += 1
        points.append(f"{_x(slowdown):.1f} {_y(done / len(outcomes)):.1f}")
    path = " L".join(points)
    return f'<path d="M{path}" stroke="{colour}" stroke-width="2.2" fill="none" stroke-linejoin="round"/>'


def _bars(rows: Sequence[Row], slo: float) -> list[str]:
    kinds = list(rows[0].figures.classes)
    groups = ["all", *kinds] if len(kinds) > 1 else ["all"]
    wide = (RIGHT[1] - RIGHT[0]) / len(groups)
    bar = min(0.8 * wide / len(rows), 34)
    parts: list[str] = []
    for place, group in enumerate(groups):
        middle = RIGHT[0] + wide * (place + 0.5)
        parts.append(_text(middle, BOTTOM + 19, group, anchor="middle", fill=INK if group == "all" else PALE))
        for i, row in enumerate(rows):
            value = row.figures.attained if group == "all" else row.figures.classes.get(group, 0.0)
            x, y = middle + (i - len(rows) / 2) * bar, _y(value)
            colour = _colour(row, i)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 1.5:.1f}" height="{BOTTOM - y:.1f}" fill="{colour}"/>'
            )
            if bar >= 12:
                parts.append(_text(x + bar / 2 - 0.7, y - 4, f"{100 * value:.0f}", size=10, anchor="middle"))
    return parts
