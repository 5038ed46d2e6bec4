"""Every pipeline of the suite, woven, equals ``pipe(...)`` alone; and the documented table is what was measured."""

from __future__ import annotations

import json

import conformance.families  # noqa: F401 - registers the cases
import pytest
from conformance.case import CASES
from conformance.measure import measure
from conformance.table import RECORDS, markdown, page

ENOUGH_CLASSES, ENOUGH_FAMILIES, ENOUGH_BATCHED = 60, 30, 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_pipeline_woven_equals_itself_alone(name: str):
    """Three requests that differ in prompt, guidance, picture, seed and steps; swapping one of these must matter."""
    case = CASES[name]
    measured = measure(case)
    verdict = measured.verdict
    assert not measured.careless(case), "an equality test means nothing on a model that does not care"
    assert verdict.error is None, verdict.error
    assert verdict.equal, verdict.distances
    assert verdict.batched == (case.alone is None), (verdict.share, dict(verdict.reasons))


def test_the_table_has_every_case_and_nothing_else():
    assert set(json.loads(RECORDS.read_text())) == set(CASES)
    assert page().read_text() == markdown()


def test_the_suite_is_as_broad_as_it_claims():
    records = json.loads(RECORDS.read_text())
    cases = [CASES[name] for name in records]
    assert len({case.pipeline for case in cases}) >= ENOUGH_CLASSES
    assert len({case.family for case in cases}) >= ENOUGH_FAMILIES
    assert all(record["equal"] for record in records.values())


def test_nine_classes_in_ten_batch():
    records = json.loads(RECORDS.read_text())
    batched = {CASES[name].pipeline for name, record in records.items() if record["batched"]}
    assert len(batched) >= ENOUGH_BATCHED * len({CASES[name].pipeline for name in records})
