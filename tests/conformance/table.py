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

from steploom.worker.trials import trial

RECORDS = pathlib.Path(__file__).with_name("measured.json")

HEAD = """# Which pipelines, measured

{classes} pipeline classes of {families} families of diffusers {diffusers}, with tiny random weights, each with three
requests that differ in prompt, guidance, picture, seed and number of steps. **Equal**: every request came out as from
`pipe(...)` alone, within {tolerance} of the scale of its latents, and swapping any of these arguments moves them by at
least 20 times that. **Batched**: of the denoiser calls made while all three ran, at least 80% carried all three.

Where a pipeline alone moves further than {tolerance} when its networks round otherwise, {times:g} times as far as that
is allowed, and swapping an argument must move it by twice what is allowed. So judged are
{apart}.

{equal} of {cases} cases are equal. Some classes are there more than once, with a variant in parentheses: texts of
equal or unequal lengths, other inputs, another noise scheduler. Of {classes} classes, {every} are batched
({every_share:.1%}) if a class counts only where all of its cases are, {plain} ({plain_share:.1%}) if its first case
decides, and {some} ({some_share:.1%}) if one case is enough.

Why a case is not batched is what the engine says of its denoiser calls that ran alone, the most frequent reason; what
is in parentheses after it is checked on the model. Measured by `python -m conformance.table` in `tests/` (float32,
CPU); `nox -s slow` asserts every row.

"""


def counted(records: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """The classes, and which of them are batched by each of the three rules."""
    cases: dict[str, list[str]] = {}
    for name in records:
        cases.setdefault(CASES[name].pipeline, []).append(name)
    batched = {name for name, one in records.items() if one["batched"]}
    return {
        "classes": set(cases),
        "every": {cls for cls, names in cases.items() if batched.issuperset(names)},
        "plain": {cls for cls, names in cases.items() if _first(names) in batched},
        "some": {cls for cls, names in cases.items() if not batched.isdisjoint(names)},
    }


def _first(names: list[str]) -> str:
    """The case of a class that is registered first: the one without a variant, if there is one."""
    return min(names, key=lambda name: (bool(CASES[name].variant), list(CASES).index(name)))


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
        "why": None if verdict.batched else verdict.why_not[0][0],
    }


def markdown() -> str:
    """The page, from the records."""
    import diffusers

    records: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())
    cases = [CASES[name] for name in records]
    classes = {rule: len(names) for rule, names in counted(records).items()}
    shares = {f"{rule}_share": count / classes["classes"] for rule, count in classes.items()}
    text = HEAD.format(
        times=trial.ROUNDINGS, apart=_further(records) or "no case",
        **classes, **shares, families=len({case.family for case in cases}), cases=len(cases), tolerance="1e-4",
        diffusers=".".join(diffusers.__version__.split(".")[:2]), equal=sum(one["equal"] for one in records.values()),
    )  # fmt: skip
    rows = ["| Family | Pipeline | Kind | Equal | Batched, or why not |", "| - | - | - | - | - |"]
    for name in sorted(records, key=lambda n: (CASES[n].family.lower(), n)):
        case, one = CASES[name], records[name]
        variant = f" ({case.variant})" if case.variant else ""
        because = f" ({case.because})" if case.because else ""
        why = f"{one['share']:.0%}" if one["batched"] else f"no: {one['why']}{because}"
        equal = f"yes, {one['worst']:.0e}" if one["equal"] else "NO"
        rows.append(f"| {case.family} | `{case.pipeline}`{variant} | {case.kind} | {equal} | {why} |")
    return text + "\n".join(rows) + "\n"


def _further(records: dict[str, dict[str, Any]]) -> str:
    """The cases that are further apart than the tolerance: judged by the pipeline's own rounding."""
    names = sorted(name for name, one in records.items() if one["equal"] and one["worst"] > trial.TOLERANCE)
    cases = [CASES[name] for name in names]
    return ", ".join(f"`{one.pipeline}`" + (f" ({one.variant})" if one.variant else "") for one in cases)


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
