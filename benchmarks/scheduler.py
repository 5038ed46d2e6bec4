"""What the scheduler costs per tick, and an abort, whatever waits.

``python benchmarks/scheduler.py`` prints a table; ``--save`` also writes it to ``benchmarks/results/scheduler.json``;
``--check`` ends with an error if a median is over its limit. Only ``schedule()`` and ``update_from_output()`` count,
not the making of the worker's answers. In a *join* tick one request ends and another joins; the *mean tick* is that of
whole lives, with all joins and ends; the limits are for ticks without. All cases are measured in several rounds; best
and median are those of the quietest round: whatever else runs on the machine can only make a round slower. The 99th
percentile and the most are those of the noisiest one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scheduler_cases import WAITING, aborts, firsts, joins, lives, mixed, sizes, submissions, ticks, timed

RESULTS = pathlib.Path(__file__).parent / "results" / "scheduler.json"


class Row(NamedTuple):
    """Microseconds of one case."""

    what: str
    best_us: float
    median_us: float
    p99_us: float
    most_us: float
    limit_us: float | None


def row(what: str, limit_us: float | None, seconds: Iterator[float]) -> Row:
    figures = sorted(value * 1e6 for value in seconds)
    best, median, p99 = figures[0], statistics.median(figures), figures[int(len(figures) * 0.99)]
    return Row(what, round(best, 2), round(median, 2), round(p99, 2), round(figures[-1], 2), limit_us)


def merge(rounds: tuple[Row, ...]) -> Row:
    """One row of a case's rounds: the quietest figures, but the noisiest tail."""
    what, best, median, p99, most, limit = zip(*rounds, strict=True)
    return Row(what[0], min(best), min(median), max(p99), max(most), limit[0])


def cases(repeat: int) -> Iterator[Callable[[], Row]]:
    for running, limit in ((8, 10.0), (64, 60.0)):
        for waiting, shapes, text in ((0, 1, "none"), (WAITING, 1, "10,000"), (WAITING, WAITING, "10,000 shapes")):
            what = f"tick, {running} running, waiting: {text}"
            yield lambda r=running, w=waiting, s=shapes, t=what, x=limit: row(t, x, ticks(r, w, s, repeat))
        what = f"tick, {running} running, default places: 10,000"
        yield lambda r=running, t=what, x=limit: row(t, x, ticks(r, WAITING, 1, repeat, None))
        for guesses, distinct, text in ((1, False, ""), (4000, False, " of 4,000 guesses"), (1, True, " priorities")):
            what = f"join, {running} running, waiting: 10,000{text}"
            yield lambda r=running, g=guesses, d=distinct, t=what: row(t, None, joins(r, g, d, repeat))
    for running in (8, 64):
        what = f"mean tick of requests of 20 steps, {running} running, waiting: 10,000"
        yield lambda r=running, t=what: row(t, None, lives(r, 20, repeat))
    for running, shapes, limit in ((8, 3, 10.0), (8, 8, 10.0), (64, 3, 60.0)):
        for waiting, text in ((0, "none"), (WAITING, "10,000")):
            what = f"tick, {running} running of {shapes} shapes, waiting: {text}"
            yield lambda r=running, n=shapes, w=waiting, t=what, x=limit: row(t, x, mixed(r, n, w, repeat))
    for count in (8, 300):
        for before, text in ((0, "first joins"), (4000, "joins")):
            what = f"{text}, 8 running of {count} sizes, waiting: 10,000"
            yield lambda n=count, b=before, t=what: row(t, None, sizes(n, b, min(repeat, 500)))
    for own, text in (({}, ""), ({"deadline": 600.0}, " deadlines")):
        yield lambda o=own, t=text: row(f"first ticks, waiting: 10,000{t}", None, firsts(o, min(repeat, 500)))
    yield lambda: row("abort, waiting: 10,000", 10.0, aborts(1, False, repeat))
    yield lambda: row("abort, waiting: 10,000 shapes", 10.0, aborts(WAITING, False, repeat))
    yield lambda: row("abort, waiting: 10,000 priorities", 10.0, aborts(1, True, repeat))
    yield lambda: row("add_request, waiting: 10,000", None, submissions(WAITING, repeat))
    yield lambda: row("add_request, timeout, hopeless refused: 10,000", None, timed(WAITING - 1, repeat))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1000, help="repetitions in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all cases (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scheduler.json")
    parser.add_argument("--check", action="store_true", help="end with an error if a median is over its limit")
    args = parser.parse_args()
    print(f"{'microseconds':<62}{'best':>9}{'median':>9}{'p99':>9}{'most':>10}{'limit':>8}")
    rounds = [[case() for case in cases(args.repeat)] for _ in range(args.rounds)]
    rows = [merge(same) for same in zip(*rounds, strict=True)]
    for what, best, median, p99, most, limit in rows:
        print(f"{what:<62}{best:>9}{median:>9}{p99:>9}{most:>10}{limit or '':>8}")
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        machine |= {"load": round(os.getloadavg()[0], 1), "repeat": args.repeat, "rounds": args.rounds}
        RESULTS.write_text(
            json.dumps({"machine": machine, "rows": [entry._asdict() for entry in rows]}, indent=2) + "\n"
        )
    over = [entry.what for entry in rows if entry.limit_us and entry.median_us > entry.limit_us]
    if args.check and over:
        print("over the limit: " + "; ".join(over), file=sys.stderr)
    return 1 if args.check and over else 0


if __name__ == "__main__":
    sys.exit(main())
