"""What the rounds of ``latency.py`` come to, and how it is shown."""

from __future__ import annotations

import statistics
from typing import Any

CONTESTANTS = ("lock", "pool", "static", "inproc", "mp")


def summary(rounds: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds; ratios to the lock's are formed inside a round."""
    found: dict[str, Any] = {}
    parts = sorted({part for entry in rounds.values() for part in entry if part.startswith("w1")})
    for part in parts:
        entries = [entry[part] for entry in rounds.values() if part in entry]
        for name in {name for entry in entries for name in entry}:
            rows = [entry[name] for entry in entries if name in entry]
            both = [(entry[name], entry["lock"]) for entry in entries if name in entry and "lock" in entry]
            found.setdefault(part, {})[name] = {
                "rounds": len(rows),
                **{key: median(row.get(key) for row in rows) for key in
                   ("slo_attainment", "mean_e2el_ms", "p99_e2el_ms", "mean_slowdown", "request_goodput", "mean_rows",
                    "mean_batch_requests", "failed", "p99_join_delay_steps_slot_free")},
                "attainment_of_locks": median(ratio(a["slo_attainment"], b["slo_attainment"]) for a, b in both),
                "mean_e2el_of_locks": median(ratio(a["mean_e2el_ms"], b["mean_e2el_ms"]) for a, b in both),
            }  # fmt: skip
    bursts = [entry["burst"] for entry in rounds.values() if "burst" in entry]
    for name in {name for entry in bursts for name in entry}:
        runs = [run for entry in bursts for run in entry.get(name, ())]
        found.setdefault("burst", {})[name] = {
            "last_image_s": median(run["last_image_s"] for run in runs),
            "of_ceiling": median(run["last_image_s"] / run["seconds"] for run in runs),
            "of_ceiling_with_encode": median(run["last_image_s"] / run["with_encode_s"] for run in runs),
        }
    joins = [entry["join"] for entry in rounds.values() if "join" in entry]
    keys = ("knee", "p99_join_delay_steps_slot_free", "max_join_delay_steps_slot_free", "joins_with_slot_free")
    return {**found, **({"join": {key: median(row[key] for row in joins) for key in keys}} if joins else {})}


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def median(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def show(found: dict[str, Any]) -> None:
    cells = ("slo_attainment", "attainment_of_locks", "mean_e2el_ms", "mean_e2el_of_locks", "p99_e2el_ms",
             "mean_slowdown", "mean_rows", "p99_join_delay_steps_slot_free")  # fmt: skip
    heads = ("attained", "of lock's", "mean ms", "of lock's", "p99 ms", "slowdown", "rows", "join p99")
    for part, rows in found["summary"].items():
        print(f"\n{part}")
        if part.startswith("w1"):
            print(f"{'':8}" + "".join(f"{head:>11}" for head in heads))
        shown = {name: rows[name] for name in CONTESTANTS if name in rows} if part != "join" else {"": rows}
        for name, row in shown.items():
            if part.startswith("w1"):
                print(f"{name:8}" + "".join("          -" if row[c] is None else f"{row[c]:11.3f}" for c in cells))
            else:
                print(f"{name:8}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items() if value is not None))
