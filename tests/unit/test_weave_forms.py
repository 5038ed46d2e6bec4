"""A call in the form of an earlier one is what it would be anew; what rests on contents is looked at again."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom.weave.axes import Axes
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.forms import FORMS_KEPT, Facts, formed_call


class Echo:
    """Stands for a shared module."""

    def __init__(self, function: Any = lambda x, *_, **__: x) -> None:
        self.function = function
        self.name, self.key, self.method, self.module = "transformer", "echo", "forward", self
        self.group, self.ragged, self.language, self.adapted = "echo", None, None, None
        self.seen: list[tuple[Any, ...]] = []

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        return self.function(*args, **kwargs)


def sizes(call: ModuleCall) -> list[Any]:
    return [[t.shape for t in leaf] if isinstance(leaf, list) else leaf.shape for leaf in call.leaves]


scalars = st.sampled_from([None, True, False, 0, 1, 1.0, 0.0, "a", 2.5])
tensors = st.sampled_from([(1,), (2, 3), (2, 4), ()]).map(torch.zeros)
values = st.recursive(
    scalars | tensors | st.lists(tensors, min_size=1, max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    | st.tuples(inner, inner),
    max_leaves=6,
)  # fmt: skip
arguments = st.tuples(
    st.lists(values, max_size=2).map(tuple), st.dictionaries(st.sampled_from("abc"), values, max_size=3)
)


@given(arguments, arguments)
def test_a_call_has_a_known_form_only_if_it_would_be_taken_apart_alike(one: Any, other: Any):
    target, forms = Echo(), OrderedDict()
    first = formed_call(target, *one, forms)  # pyright: ignore[reportArgumentType]
    second = formed_call(target, *other, forms)  # pyright: ignore[reportArgumentType]
    anew = ModuleCall(target, *other)  # pyright: ignore[reportArgumentType]
    assert second.structure == anew.structure
    assert sizes(second) == sizes(anew)
    alike = first.structure == anew.structure and sizes(first) == sizes(anew)
    assert (second.form is first.form) == alike


@given(arguments)
def test_the_same_call_a_step_later_has_the_form_and_its_own_tensors(given_: Any):
    target, forms = Echo(), OrderedDict()
    first = formed_call(target, *given_, forms)  # pyright: ignore[reportArgumentType]
    later = copy.deepcopy(given_)
    again = formed_call(target, *later, forms)  # pyright: ignore[reportArgumentType]
    assert again.form is first.form is not None
    anew = ModuleCall(target, *later)  # pyright: ignore[reportArgumentType]
    for own, expected in zip(again.leaves, anew.leaves, strict=True):
        assert type(own) is type(expected)
        pairs = zip(own, expected, strict=True) if isinstance(own, list) else [(own, expected)]
        assert all(a is b for a, b in pairs)


@pytest.mark.parametrize(("one", "other"), [([1, 4], [True, 4]), ([1], [1.0]), ({"a": 1}, {"b": 1}), ((1,), [1])])
def test_values_that_python_calls_equal_are_told_apart(one: Any, other: Any):
    target, forms = Echo(), OrderedDict()
    first = formed_call(target, (), {"shapes": one}, forms)  # pyright: ignore[reportArgumentType]
    second = formed_call(target, (), {"shapes": other}, forms)  # pyright: ignore[reportArgumentType]
    assert second.form is not first.form


def test_a_tensor_that_was_reshaped_in_place_has_another_form():
    target, forms, text = Echo(), OrderedDict(), torch.ones(2, 3)
    first = formed_call(target, (torch.zeros(1), text), {}, forms)  # pyright: ignore[reportArgumentType]
    again = formed_call(target, (torch.zeros(1), text), {}, forms)  # pyright: ignore[reportArgumentType]
    assert again.form is first.form
    text.unsqueeze_(0)
    other = formed_call(target, (torch.zeros(1), text), {}, forms)  # pyright: ignore[reportArgumentType]
    assert other.form is not first.form
    assert sizes(other) == [(1,), (1, 2, 3)]


@pytest.mark.parametrize(("name", "held"), [("vae", False), ("transformer", True)])
def test_only_a_call_that_comes_again_holds_its_tensors(name: str, held: bool):
    target, forms, video = Echo(), OrderedDict(), torch.ones(2, 3)
    target.name = name
    formed_call(target, (video,), {}, forms)  # pyright: ignore[reportArgumentType]
    gone = weakref.ref(video)
    del video
    assert (gone() is not None) == held
    formed_call(target, (torch.ones(2, 3),), {}, forms)  # pyright: ignore[reportArgumentType]
    assert gone() is None


def test_an_object_of_its_own_has_no_form():
    assert formed_call(Echo(), (object(),), {}, OrderedDict()).form is None  # pyright: ignore[reportArgumentType]


def test_forms_of_a_program_are_few():
    target, forms = Echo(), OrderedDict()
    for width in range(10):
        formed_call(target, (torch.zeros(1, width),), {}, forms)  # pyright: ignore[reportArgumentType]
    assert len(forms["echo"]) == FORMS_KEPT


def test_facts_fall_with_the_contents_that_they_rest_on():
    shared = torch.ones(3)
    facts = Facts(1, Axes(), 0, {1: shared})
    leaves: list[Any] = [torch.zeros(2), shared]
    assert facts.hold(1, leaves)
    assert facts.hold(1, [torch.zeros(2), shared])
    assert not facts.hold(2, leaves)
    assert not facts.hold(1, [torch.zeros(2), torch.ones(3)])
    shared.add_(1)
    assert not facts.hold(1, leaves)


def batch(target: Any, latents: list[torch.Tensor], texts: list[torch.Tensor]) -> list[ModuleCall]:
    return [ModuleCall(target, (x, text), {}) for x, text in zip(latents, texts, strict=True)]


def test_a_merged_call_is_run_again_with_the_rows_of_the_next_step():
    target = Echo(lambda x, text: x + text)
    texts = [torch.full((1, 2), float(i)) for i in range(3)]
    merged = MergedCall(batch(target, [torch.zeros(1, 2)] * 3, texts), Axes((0, 0), (0,)))
    merged.run()
    for step in range(1, 4):
        latents = [torch.full((1, 2), 10.0 * step + i) for i in range(3)]
        assert merged.refill(batch(target, latents, texts))
        assert [row[0, 0].item() for row in merged.run()] == [10 * step + 2 * i for i in range(3)]
    assert target.seen[0][0][1] is target.seen[3][0][1], "texts were merged again"


def test_what_was_merged_before_is_merged_anew_when_a_part_or_the_whole_was_updated_in_place():
    target = Echo(lambda x, text: (x + text, text.add_(100))[0])  # a module that writes into its arguments
    texts = [torch.full((1, 2), float(i)) for i in range(2)]
    latents = [torch.zeros(1, 2)] * 2
    merged = MergedCall(batch(target, latents, texts), Axes((0, 0), (0,)))
    assert [row[0, 0].item() for row in merged.run()] == [0, 1]
    assert merged.refill(batch(target, latents, texts))
    assert [row[0, 0].item() for row in merged.run()] == [0, 1]
    texts[0].add_(7)
    assert merged.refill(batch(target, latents, texts))
    assert [row[0, 0].item() for row in merged.run()] == [7, 1]


def test_results_of_single_rows_do_not_hold_their_mates_unless_for_a_step():
    for name, shares in (("transformer", True), ("text_encoder", False)):
        target = Echo()
        target.name = name
        merged = MergedCall(batch(target, [torch.ones(1, 2)] * 3, [torch.ones(1, 2)] * 3), Axes((0, 0), (0,)))
        sizes = [result.untyped_storage().nbytes() for result in merged.run()]
        assert sizes == [(3 if shares else 1) * 8] * 3
