"""A merged call that fails hurts only the culprit; merges that cannot be trusted are never made."""

from __future__ import annotations

import pytest
import tiny
import torch
from driving import Driver, alone, assert_equal_to_alone, config, distance, request

from steploom.weave.verifying import verify
from steploom.worker.runner import Runner

TEXT = {"height": 32, "width": 32, "max_sequence_length": 16}


def requests(count: int, steps: int = 4):
    return [request(f"r{i}", f"prompt {i}", i, num_inference_steps=steps, **TEXT) for i in range(count)]


def poison_when(pipe, condition):
    """The transformer raises whenever a row fulfils ``condition``."""
    forward = type(pipe.transformer).forward

    def poisoned(self, hidden_states, *args, **kwargs):
        if bool(condition(hidden_states).any()):
            raise RuntimeError("poisoned row")
        return forward(self, hidden_states, *args, **kwargs)

    pipe.transformer.__class__ = type("Poisoned", (type(pipe.transformer),), {"forward": poisoned})


@pytest.mark.parametrize("culprit", [0, 3, 6])
def test_poison_hurts_only_the_culprit(culprit):
    pipe = tiny.sd3()
    everyone = requests(7)
    expected = {r.request_id: alone(pipe, r) for r in everyone}
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(culprit))
    mark = latents[0, 0, 0, 0].item()
    poison_when(pipe, lambda rows: rows[:, 0, 0, 0] == mark)
    finished = Driver(Runner.from_pipeline(pipe, config())).drain(everyone)
    for r in everyone:
        report = finished[r.request_id]
        if r.request_id == f"r{culprit}":
            assert report.error is not None
            assert report.error.kind == "GenerationFailed"
            assert "poisoned row" in report.error.message
        else:
            assert report.error is None, report.error.message
            assert distance(report.output, expected[r.request_id]) <= 1e-4


def test_after_a_culprit_the_others_go_on_sharing():
    pipe = tiny.sd3()
    mark = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))[0, 0, 0, 0].item()
    poison_when(pipe, lambda rows: rows[:, 0, 0, 0] == mark)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain(requests(5))
    assert driver.sharing("r0")[-2:] == [4, 4]
    assert "a merged call failed" in driver.runner.stats().alone_calls


def broken(pipe, forward_of):
    original = type(pipe.transformer).forward
    pipe.transformer.__class__ = type("Broken", (type(pipe.transformer),), {"forward": forward_of(original)})


def reads_row_zero(original):
    """Uses the first row's timestep for all rows: right alone, wrong when merged."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, **kwargs):
        timestep = timestep[:1].expand(timestep.shape)
        return original(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, **kwargs)

    return forward


def mixes_rows(original):
    """Adds a little of the last row to all others."""

    def forward(self, hidden_states, *args, **kwargs):
        return original(self, hidden_states + 1e-5 * (hidden_states[-1:] - hidden_states), *args, **kwargs)

    return forward


@pytest.mark.parametrize("break_it", [reads_row_zero, mixes_rows])
def test_a_module_with_crosstalk_is_never_merged(break_it):
    def build():
        pipe = tiny.sd3()
        broken(pipe, break_it)
        return pipe

    everyone = [
        request("a", "a cat", 1, num_inference_steps=4, guidance_scale=1.0, **TEXT),
        request("b", "dogs", 2, num_inference_steps=7, guidance_scale=1.0, **TEXT),
    ]
    driver, _ = assert_equal_to_alone(build, everyone)
    assert set(driver.sharing("a") + driver.sharing("b")) == {1}
    reasons = driver.runner.stats().kinds
    assert any("mates" in reason or "alone" in reason for reason in reasons.values()), reasons


def test_crosstalk_is_found_although_the_first_mates_agree():
    """Both requests start with the same timestep: the synthetic mates of the check differ in every argument."""

    def build():
        pipe = tiny.sd3()
        broken(pipe, reads_row_zero)
        return pipe

    everyone = [request(n, n, i, num_inference_steps=5, guidance_scale=1.0, **TEXT) for i, n in enumerate("ab")]
    driver, _ = assert_equal_to_alone(build, everyone)
    assert set(driver.sharing("a")) == {1}


def test_a_module_that_refuses_batches_runs_alone_with_a_counted_reason():
    def one_row_only(original):
        def forward(self, hidden_states, *args, **kwargs):
            if len(hidden_states) > 2:
                raise ValueError("one request at a time, please")
            return original(self, hidden_states, *args, **kwargs)

        return forward

    def build():
        pipe = tiny.sd3()
        broken(pipe, one_row_only)
        return pipe

    everyone = requests(3)
    pipe = build()
    expected = {r.request_id: alone(pipe, r) for r in everyone}
    driver = Driver(Runner.from_pipeline(pipe, config()))
    finished = driver.drain(everyone)
    for r in everyone:
        assert distance(finished[r.request_id].output, expected[r.request_id]) <= 1e-4
    reasons = driver.runner.stats().alone_calls
    assert any("one request at a time" in reason for reason in reasons), reasons


def shaky(fails):
    """A pipeline whose merged forwards fail where ``fails(number)`` says so, from 1; alone none does."""
    pipe, merged = tiny.sd3(), []

    def fail(module, args, kwargs):
        rows = len(kwargs["hidden_states"])
        if rows > 2:
            merged.append(rows)
            if fails(len(merged)):
                raise RuntimeError("a bad moment")

    pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    return pipe, merged


def test_a_merged_forward_that_fails_once_does_not_end_sharing():
    plan, expected = [9, 10], [alone(tiny.sd3(), r) for r in requests(2, 12)]
    pipe, _ = shaky(plan.__contains__)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    finished = driver.drain(requests(2, 12))
    assert [finished[f"r{i}"].error for i in range(2)] == [None, None]
    assert max(distance(finished[f"r{i}"].output, expected[i]) for i in range(2)) <= 1e-4
    assert driver.sharing("r0").count(1) == 2
    assert driver.sharing("r0")[-1] == 2
    assert set(driver.runner.stats().kinds.values()) == {"verified"}


def test_what_went_well_since_is_forgiveness(monkeypatch):
    monkeypatch.setattr(verify, "FORGIVEN", 4)
    pipe, _ = shaky(lambda number: number > 8 and number % 6 == 0)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.drain(requests(2, 30))
    assert driver.sharing("r0").count(1) > verify.TRIES
    assert set(driver.runner.stats().kinds.values()) == {"verified"}


def test_merged_forwards_that_fail_every_time_or_often_end_soon():
    for fails, most in ((lambda number: number > 8, 8 + verify.TRIES), (lambda number: number % 9 == 0, 27)):
        pipe, merged = shaky(fails)
        driver = Driver(Runner.from_pipeline(pipe, config()))
        finished = driver.drain(requests(2, 40))
        assert [finished[f"r{i}"].error for i in range(2)] == [None, None]
        assert len(merged) == most
        assert set(driver.sharing("r0")[most:]) == {1}
        assert any("a bad moment" in reason for reason in driver.runner.stats().kinds.values())


def test_bad_arguments_are_the_requests_own_fault():
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config()))
    bad = request("bad", "x", height=33, width=32, num_inference_steps=2)
    finished = driver.drain([bad, *requests(2)])
    assert finished["bad"].error is not None
    assert finished["bad"].error.kind == "InvalidRequest"
    assert "33" in finished["bad"].error.message
    assert finished["r0"].error is None
    assert driver.runner.stats().resident == 0
