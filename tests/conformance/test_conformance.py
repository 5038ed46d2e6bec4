"""Every pipeline of the suite, woven, equals ``pipe(...)`` alone; and the documented table is what was measured."""

from __future__ import annotations

import json

import conformance.families  # noqa: F401 - registers the cases
import pytest
from conformance.case import CASES
from conformance.claims import CHECKS, LEAKS, NO_MASK
from conformance.measure import measure
from conformance.table import RECORDS, counted, markdown, page

from steploom.config import EngineConfig
from steploom.engine.checks.validation import check_arguments
from steploom.worker.family import Family

ALWAYS = ("JoyImageEditPipeline", "JoyImageEditPipeline-drawn")
"""Cases of a class that edits, and draws where it is given no picture."""

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
    if case.alone is not None:
        assert verdict.why_not[0][0].startswith(case.alone), verdict.why_not


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ALWAYS)) for name in sorted(CASES)]
)
def test_the_engine_takes_what_the_case_asks_for(name: str):
    case = CASES[name]
    info = Family(case.build(), EngineConfig(), in_process=True).info
    for i in range(3):
        check_arguments(case.request(i), info, EngineConfig())


def test_why_cases_are_not_batched_is_what_was_measured():
    records = json.loads(RECORDS.read_text())
    written = {name: case.alone for name, case in CASES.items() if case.alone is not None}
    found = {name: one["why"] for name, one in records.items() if not one["batched"]}
    assert found.keys() == written.keys()
    assert [name for name in found if not found[name].startswith(written[name])] == []


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.because))
def test_what_the_table_says_of_a_model_holds(name: str):
    """Beyond what the engine measured: of the model itself."""
    case = CASES[name]
    assert case.alone is not None
    assert CHECKS[case.because](case)


def test_those_checks_tell():
    """Of a model that takes a mask, and of one whose mask hides padding."""
    assert not CHECKS[NO_MASK](CASES["LattePipeline"])
    assert not CHECKS[LEAKS](CASES["LuminaPipeline"])


def test_the_table_has_every_case_and_nothing_else():
    assert set(json.loads(RECORDS.read_text())) == set(CASES)
    assert page().read_text() == markdown()


def test_the_suite_is_as_broad_as_it_claims():
    records = json.loads(RECORDS.read_text())
    cases = [CASES[name] for name in records]
    assert len({case.pipeline for case in cases}) >= ENOUGH_CLASSES
    assert len({case.family for case in cases}) >= ENOUGH_FAMILIES
    assert all(record["equal"] for record in records.values())


@pytest.mark.parametrize("rule", ["every", "plain", "some"])
def test_nine_classes_in_ten_batch(rule: str):
    """Whether all cases of a class count, or its first, or any."""
    found = counted(json.loads(RECORDS.read_text()))
    assert len(found[rule]) >= ENOUGH_BATCHED * len(found["classes"])
