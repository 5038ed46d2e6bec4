"""Scheduling policies on a virtual clock: the real schedulers, a table of costs, thousands of requests in seconds.

    python benchmarks/simulate.py
    python benchmarks/simulate.py --workload W1 --load 0.7,0.93 --policy lock,fcfs --requests 2000 --seeds 3
    python benchmarks/simulate.py --workload W2 --shapes 512 --goodput
    python benchmarks/simulate.py --workload W3 --trace gentd26_part1.csv --picture w3.svg --json w3.json
    python benchmarks/simulate.py --costs demo-cpu --shapes 32,48,64,96
    python benchmarks/simulate.py --measure demo
    python benchmarks/simulate.py --docs

Every policy gets the same requests. The same seeds give the same figures, on any machine. A load of 1 is what one
request at a time can just do. Time is lost to nothing but ticks: no tokenizer, no network, no garbage collection; one
tick is in flight at a time, and neither aborts nor faults occur.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from simulation import costs as cost_tables
from simulation import document
from simulation.figures import SLO
from simulation.picture import picture
from simulation.scenario import WORKLOADS, Scenario
from simulation.study import Row, Study, known_policies
from simulation.tables import print_goodput, print_rows

from steploom.errors import SteploomError


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workload", type=names, default=["W1"], help=f"of {', '.join(WORKLOADS)} (default: W1)")
    add("--load", type=numbers, default=[0.93], help="several with commas (default: 0.93)")
    add("--policy", type=names, help="names, or pkg.module.Class; lock is one at a time (default: all)")
    add("--costs", default="h200", help="h200, demo-cpu, or a JSON or CSV file (default: %(default)s)")
    add("--shapes", type=sizes, help="pixels of the workload's classes, from the smallest; 512 alone is one class")
    add("--trace", type=Path, help="W3's file: a CSV of the GenTD26 form")
    add("--requests", type=positive, default=10_000, help="of each run (default: %(default)s; W4 has 24)")
    add("--warm-up", type=int, default=200, help="requests before these that do not count (default: %(default)s)")
    add("--seeds", type=positive, default=1, help="runs, whose medians are shown (default: %(default)s)")
    add(
        "--slo",
        type=float,
        default=SLO,
        help="times its standalone time that a request may take (default: %(default)s)",
    )
    add("--timeout", type=float, help="seconds after which requests are given up")
    add("--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help="of EngineConfig: max_batch=4")
    add("--goodput", action="store_true", help="find the highest load at which enough requests finish in time")
    add("--target", type=float, default=0.9, help="what is enough (default: %(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw the first load there, as SVG; one for each workload")
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    add("--docs", nargs="?", const=document.DOCS / "policies.md", type=Path, metavar="FILE",
        help="write the tables and pictures of docs/policies.md; those of W3 if --trace is given")  # fmt: skip
    add("--measure", metavar="MODEL", help="measure the costs of a model on this machine: demo, or a folder")
    add("--rounds", type=positive, default=3, help="of --measure (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[float]:
    values = [float(name) for name in names(text)]
    if not values or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers greater than 0, with commas between them")
    return values


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(value) for value in numbers(text))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return int(text)


def setting(text: str) -> tuple[str, Any]:
    """``max_batch=4``: a number, true or false, or else text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(options: argparse.Namespace, study: Study) -> dict[str, Any]:
    """All workloads, loads and policies that were asked for."""
    table, policies = cost_tables.load(options.costs), options.policy or known_policies()
    rows: list[Row] = []
    goodputs: list[dict[str, Any]] = []
    for workload in options.workload:
        scenario = Scenario(workload, table, options.shapes, options.requests, options.warm_up, options.trace)
        if options.goodput and not scenario.bursts:
            found = study.goodputs(scenario, policies, options.target)
            for policy, (load, rate) in zip(policies, found, strict=True):
                goodputs.append({"workload": workload, "policy": policy, "load": load, "rate_per_s": rate})
            print_goodput([one for one in goodputs if one["workload"] == workload], options.target)
            continue
        loads = options.load[:1] if scenario.bursts else options.load
        found = study.rows(scenario, policies, loads)
        for load in loads:
            print_rows([row for row in found if row.load == load])
        if options.picture:
            place = options.picture
            if len(options.workload) > 1:
                place = place.with_stem(f"{place.stem}-{workload.lower()}")
            place.write_text(picture([row for row in found if row.load == loads[0]], options.slo))
        rows += found
    return {"rows": [row.as_json() for row in rows], "goodput": goodputs}


def measure(options: argparse.Namespace) -> None:
    """Writes the costs of a model."""
    import asyncio

    from simulation.measure import SIZES, measured

    table, about = asyncio.run(measured(options.measure, options.shapes or SIZES, options.rounds, tell))
    file = options.json or cost_tables.RESULTS / f"costs-{table.name}.json"
    file.write_text(json.dumps({**table.as_json(), "measured": about}, indent=1) + "\n")
    print(f"wrote {file}")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.measure:
        measure(options)
        return 0
    study = Study(options.seeds, options.slo, options.timeout, dict(options.set), tell, options.jobs)
    try:
        if options.docs:
            fixed = dataclasses.replace(study, seeds=document.SEEDS)
            print(*document.write(options.docs, options.trace, fixed), sep="\n")
            return 0
        record = compare(options, study)
    except (SteploomError, ValueError, TypeError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name not in ("json", "set")}
        record = {"options": asked | {"set": dict(options.set)}, **record}
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
