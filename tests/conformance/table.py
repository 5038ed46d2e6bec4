"""The table in the documentation: ``python -m conformance.table`` (in ``tests/``) measures every case and writes it."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import torch
from conformance.case import CASES, Case
from conformance.measure import measure

RECORDS = pathlib.Path(__file__).with_name("measured.json")

HEAD = """# Which pipelines, measured

{classes} pipeline classes of {families} families of diffusers {diffusers}, with tiny random weights, each with three
requests that differ in prompt, guidance, picture, seed and number of steps. **Equal**: every request came out as from
`pipe(...)` alone, within {tolerance} of the scale of its latents, and swapping any of these arguments moves them by at
least 20 times that. **Batched**: of the denoiser calls made while all three ran, at least 80% carried all three.

{equal} of {cases} cases are equal; {batched} of {classes} classes are batched. Measured by
`python -m conformance.table` in `tests/` (float32, CPU); `nox -s slow` asserts every row.

"""


def page() -> pathlib.Path:
    """Where the table goes."""
    return pathlib.Path(__file__).parents[2] / "docs" / "conformance.md"


def record(case: Case) -> dict[str, Any]:
    """What the table says of a case."""
    verdict = measure(case).verdict
    return {
        "equal": verdict.equal,
        "worst": max(verdict.distances, default=float("inf")),
        "share": round(verdict.share, 2),
        "batched": verdict.batched,
    }


def markdown() -> str:
    """The page, from the records."""
    import diffusers

    records: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())
    cases = [CASES[name] for name in records]
    batched = {CASES[name].pipeline for name, one in records.items() if one["batched"]}
    version = ".".join(diffusers.__version__.split(".")[:2])
    text = HEAD.format(
        classes=len({case.pipeline for case in cases}), families=len({case.family for case in cases}),
        diffusers=version, tolerance="1e-4", equal=sum(one["equal"] for one in records.values()), cases=len(cases),
        batched=len(batched),
    )  # fmt: skip
    rows = ["| Family | Pipeline | Kind | Equal | Batched, or why not |", "| - | - | - | - | - |"]
    for name in sorted(records, key=lambda n: (CASES[n].family.lower(), n)):
        case, one = CASES[name], records[name]
        variant = f" ({case.variant})" if case.variant else ""
        why = f"{one['share']:.0%}" if one["batched"] else f"no: {case.alone}"
        equal = f"yes, {one['worst']:.0e}" if one["equal"] else "NO"
        rows.append(f"| {case.family} | `{case.pipeline}`{variant} | {case.kind} | {equal} | {why} |")
    return text + "\n".join(rows) + "\n"


def main(names: list[str]) -> None:
    """Measures the named cases, or all, and writes the records and the page."""
    torch.set_num_threads(1)
    records: dict[str, Any] = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    records = {name: one for name, one in records.items() if name in CASES}
    for name in names or sorted(CASES):
        records[name] = record(CASES[name])
        print(name, records[name], flush=True)
        RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    page().write_text(markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
