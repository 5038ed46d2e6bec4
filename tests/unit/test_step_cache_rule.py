"""Step caching without a model: what ``cache=`` means, when a step is skipped, and what is kept of a call."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom import DiffusionRequest, InvalidRequest, codec
from steploom.protocol import NewRequest
from steploom.step_caches import THRESHOLDS, WARM_UP, StepCaching, parse
from steploom.weave.calls import ModuleCall
from steploom.weave.forwards.step_cache import MOST_CALLS, Rule, StepCache

CHANGES = st.lists(st.floats(0, 1), max_size=40)
THRESHOLD = st.floats(0, 3)


@pytest.mark.parametrize(
    ("given_as", "meant"),
    [
        (None, None),
        ("off", None),
        ({"name": "off"}, None),
        ("easycache", StepCaching("easycache", THRESHOLDS["easycache"])),
        ("easycache:0.1", StepCaching("easycache", 0.1)),
        ("easycache:1e-2", StepCaching("easycache", 0.01)),
        ("easycache:.5", StepCaching("easycache", 0.5)),
        ("easycache:0", None),
        ("easycache:0.0", None),
        ({"name": "easycache", "threshold": 0}, None),
        ({"name": "easycache"}, StepCaching("easycache", THRESHOLDS["easycache"])),
        ({"name": "easycache", "threshold": None}, StepCaching("easycache", THRESHOLDS["easycache"])),
        ({"name": "easycache", "threshold": 1, "warm_up": 0.5}, StepCaching("easycache", 1.0, 0.5)),
        (StepCaching("easycache", 0.3), StepCaching("easycache", 0.3)),
    ],
)
def test_what_a_request_means_is_the_same_after_a_journey(given_as: Any, meant: StepCaching | None) -> None:
    request = DiffusionRequest("a cat", cache=given_as, seed=1)
    travelled = codec.decode(codec.encode(NewRequest("r#1", request)), NewRequest).request
    assert parse(request.cache) == parse(travelled.cache) == meant


def computed(changes: list[float], threshold: float, warm_up: float) -> list[int]:
    rule = Rule(threshold, warm_up)
    return [i for i, x in enumerate(changes) if not (rule.allows(i, len(changes)) and rule.skips(x))]


@given(changes=CHANGES, threshold=THRESHOLD, warm_up=st.floats(0, 1))
def test_the_first_and_the_last_are_computed_and_no_run_of_skips_adds_up_to_the_threshold(changes, threshold, warm_up):
    done = computed(changes, threshold, warm_up)
    total = len(changes)
    first = max(2, math.ceil(warm_up * total))
    assert {*range(min(first, total)), *([total - 1] if total else [])} <= set(done)
    for one, other in itertools.pairwise(done):
        skipped = changes[one + 1 : other]
        assert not skipped or sum(skipped) < threshold
        if first <= other < total - 1:  # nor was it computed for nothing
            assert sum(changes[one + 1 : other + 1]) >= threshold


@given(changes=CHANGES, lower=THRESHOLD, higher=THRESHOLD)
def test_a_higher_threshold_never_computes_more(changes, lower, higher):
    lower, higher = sorted((lower, higher))
    assert len(computed(changes, higher, WARM_UP)) <= len(computed(changes, lower, WARM_UP))


@given(changes=CHANGES)
def test_a_threshold_of_0_and_changes_that_are_no_numbers_skip_nothing(changes):
    everything = list(range(len(changes)))
    assert computed(changes, 0.0, 0.0) == everything
    assert computed([math.nan] * len(changes), 10.0, 0.0) == everything
    assert computed([math.inf] * len(changes), 10.0, 0.0) == everything


class Trial:
    """A denoiser's loop over a cache: ``denoise`` is given the step's input and says what the module would answer."""

    def __init__(self, threshold: float, total: int | None = 20, name: str = "transformer") -> None:
        self.program: Any = SimpleNamespace(
            name="r", steps=0, skipped_steps=0, call=None, answer=None, watcher=SimpleNamespace(total_steps=total)
        )
        self.program.step_cache = self.cache = StepCache(StepCaching("easycache", threshold, 0.0))
        self._target = SimpleNamespace(name=name, method="forward", ragged=None)
        self.computed: list[int] = []

    def call(self, denoise: Any, *args: Any, **kwargs: Any) -> Any:
        """One denoiser call, as the hub goes about it."""
        program = self.program
        program.call = ModuleCall(self._target, args, kwargs)  # pyright: ignore[reportArgumentType]
        if not self.cache.answer(program):
            program.answer = denoise(*args, **kwargs)
            self.computed.append(program.steps)
            self.cache.learn(program)
        answer, program.answer, program.call = program.answer, None, None
        return answer

    def end_step(self) -> None:
        self.program.steps += 1
        self.cache.step_ended(self.program)


def loop(trial: Trial, rows: list[torch.Tensor], denoise: Any, steps: int = 20) -> torch.Tensor:
    """An Euler loop over rows ``[rows, 4]`` in one call."""
    x = torch.stack(rows)
    for _ in range(steps):
        x = x - 0.05 * trial.call(denoise, x)
        trial.end_step()
    return x


def gentle(x: torch.Tensor) -> torch.Tensor:
    return 1 + 0.01 * x


def lively(x: torch.Tensor) -> torch.Tensor:
    return 3 * torch.sin(40 * x)


def test_the_liveliest_row_of_a_request_decides() -> None:
    """Each row with an output of its own liveliness: nobody is skipped on account of calm neighbours."""
    x = torch.tensor([0.1, 0.2, 0.3, 0.4])
    calm, wild, both = Trial(0.05), Trial(0.05), Trial(0.05)
    loop(calm, [x, x], gentle)
    loop(wild, [x, x], lively)
    loop(both, [x] * 8, lambda rows: torch.cat([gentle(rows[:7]), lively(rows[7:])]))
    assert calm.computed == [0, 1, 19]
    assert len(wild.computed) >= 18
    assert set(wild.computed) - set(both.computed) == set()
    assert (calm.program.skipped_steps, both.program.skipped_steps) == (17, 20 - len(both.computed))


def test_the_estimate_is_that_of_the_paper() -> None:
    """One row, against the formulas written out."""
    x, threshold, errors, done = torch.tensor([0.5, 1.0, 1.5, 2.0]), 0.3, 0.0, []
    trial = Trial(threshold)
    denoise = lambda rows: rows**2 + 1  # noqa: E731 - the same for both
    got = loop(trial, [x], denoise)
    inputs: list[torch.Tensor] = []
    computed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(20):
        skip = False
        if 2 <= step < 19:
            (x_b, y_b), (x_c, y_c) = computed[-2:]
            k = (y_c - y_b).abs().mean() / (x_c - x_b).abs().mean()
            errors += float(k * (x - inputs[-1]).abs().mean() / y_c.abs().mean())
            skip = errors < threshold
        if skip:
            y = x + computed[-1][1] - computed[-1][0]
        else:
            y, errors = denoise(x), 0.0
            computed.append((x, y))
            done.append(step)
        inputs.append(x)
        x = x - 0.05 * y
    assert trial.computed == done
    assert 3 < len(done) < 18
    assert torch.allclose(got[0], x, atol=1e-5)


def test_both_calls_of_a_step_go_together_and_each_has_its_own_transformation() -> None:
    trial = Trial(0.05)
    x = torch.full((1, 4), 2.0)
    then = x
    for step in range(20):
        if step in (0, 1, 19):
            then = x
        first = trial.call(gentle, x)
        second = trial.call(lambda rows: -gentle(rows), x)
        assert torch.allclose(first, gentle(then) + (x - then)), step
        assert torch.allclose(second, -gentle(then) + (x - then)), step
        x = x - 0.05 * first
        trial.end_step()
    assert trial.computed == [0, 0, 1, 1, 19, 19]
    assert trial.program.skipped_steps == 17


@pytest.mark.parametrize("calls", [(gentle, lively), (lively, gentle)], ids=["second", "first"])
def test_the_livelier_call_of_a_step_decides_for_both(calls: Any) -> None:
    trial = Trial(0.05)
    x = torch.full((1, 4), 0.5)
    for _ in range(20):
        for denoise in calls:
            trial.call(denoise, x)
        x = x - 0.05 * gentle(x)
        trial.end_step()
    assert len(trial.computed) >= 36


def test_outputs_keep_their_structure_and_share_nothing_with_what_the_pipeline_may_change() -> None:
    """A tuple of: something like the input, another size, integers, a list of rows."""

    def denoise(x: torch.Tensor, rows: list[torch.Tensor]) -> Any:
        return (gentle(x), torch.ones(1, 3), torch.tensor([7]), [gentle(row) for row in rows], "text")

    trial = Trial(0.5)
    x = torch.full((1, 4), 2.0)
    for _ in range(20):
        like, other, number, rows, text = trial.call(denoise, x, [x[0]])
        assert torch.allclose(like, gentle(x), atol=0.4)
        assert torch.allclose(rows[0], gentle(x)[0], atol=0.4)
        assert (other.tolist(), number.tolist(), text) == ([[1.0] * 3], [7], "text")
        assert (like.shape, rows[0].shape, len(rows)) == ((1, 4), (4,), 1)
        x = x - 0.01 * like
        for tensor in (like, other, number, rows[0]):
            tensor.fill_(99)
        trial.end_step()
    assert trial.computed == [0, 1, 19]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, step: ((x,), {}) if step < 10 else ((torch.cat([x, x]),), {}),  # guidance begins
        lambda x, step: ((x,), {} if step < 10 else {"mask": x}),  # another kind of call
    ],
    ids=["rows", "structure"],
)
def test_a_call_that_changes_on_the_way_is_learned_anew(change: Any) -> None:
    trial = Trial(0.5)
    x = torch.full((1, 4), 2.0)
    for step in range(20):
        args, kwargs = change(x, step)
        x = x - 0.01 * trial.call(lambda rows, mask=None: gentle(rows), *args, **kwargs)[:1]
        trial.end_step()
    assert trial.computed == [0, 1, 10, 11, 19]


def test_nothing_is_skipped_where_it_could_not_be_right() -> None:
    x = torch.full((1, 4), 2.0)
    without_total = Trial(9.0, total=None)
    loop(without_total, [x[0]], gentle)
    writes_a_cache = Trial(9.0)
    for _ in range(20):
        writes_a_cache.call(lambda rows, memory: gentle(rows), x, memory=object())
        writes_a_cache.end_step()
    numbers = Trial(9.0)
    for step in range(20):
        numbers.call(lambda ids: ids, torch.tensor([[step, 2]]))
        numbers.end_step()
    many = Trial(9.0)
    for step in range(20):
        for _ in range(MOST_CALLS + 1):
            many.call(gentle, x + step)
        many.end_step()
    encoder = Trial(9.0, name="text_encoder")
    loop(encoder, [x[0]], gentle)
    for trial in (without_total, writes_a_cache, numbers, many, encoder):
        assert trial.program.skipped_steps == 0
    assert len(many.computed) == 20 * (MOST_CALLS + 1)


def test_a_cache_that_fails_ends_and_the_request_goes_on() -> None:
    trial = Trial(9.0)
    broken = torch.full((1, 4), 2.0).to("meta")  # its size is known, and nothing else
    for _ in range(20):
        trial.call(gentle, broken)
        if trial.program.step_cache is None:
            break
        trial.end_step()
    assert trial.program.step_cache is None


def test_an_odd_cache_is_refused_by_its_field() -> None:
    for odd in ("easycache:1_0", "easycache: 1", "EASYCACHE", " off", b"off", ["easycache"], 0.1, object()):
        with pytest.raises(InvalidRequest) as caught:
            DiffusionRequest("a cat", cache=odd)
        assert caught.value.field == "cache"
