"""Merging and splitting rows: the inverse of each other, branch-major, and never across what must not be mixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom.weave.axes import NOTHING_GREW, Axes, Seen, compare, guess
from steploom.weave.batching.merge_keys import Contents, Merger, rows_of
from steploom.weave.batching.merging import MergedCall, Unsplittable
from steploom.weave.calls import ModuleCall, flatten, pattern, unflatten


class Echo:
    """Stands for a shared module: notes what it was called with."""

    def __init__(self, function: Any = lambda x, **_: x) -> None:
        self.function, self.calls = function, []
        self.name, self.key, self.method, self.module = "transformer", "echo", "forward", self
        self.group, self.ragged, self.language, self.adapted = "echo", None, None, None

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


def call(target: Any, *args: Any, **kwargs: Any) -> ModuleCall:
    return ModuleCall(target, args, kwargs)


def labelled(name: int, rows: int, width: int = 2) -> torch.Tensor:
    """Row r of request ``name`` holds 10 * name + r."""
    return (10.0 * name + torch.arange(rows)).unsqueeze(1).expand(rows, width).contiguous()


def test_rows_of_equal_count_merge_branch_major():
    target = Echo()
    merged = MergedCall([call(target, labelled(1, 2)), call(target, labelled(2, 2))], Axes((0,), (0,)))
    first, second = merged.run()
    assert target.calls[0][0][0][:, 0].tolist() == [10, 20, 11, 21]
    assert first[:, 0].tolist() == [10, 11]
    assert second[:, 0].tolist() == [20, 21]


def test_blocks_of_other_row_counts_follow():
    target = Echo()
    calls = [
        call(target, labelled(1, 1)),
        call(target, labelled(2, 2)),
        call(target, labelled(3, 1)),
        call(target, labelled(4, 2)),
    ]
    merged = MergedCall(calls, Axes((0,), (0,)))
    results = dict(zip(merged.order, merged.run(), strict=True))
    assert target.calls[0][0][0][:, 0].tolist() == [20, 40, 21, 41, 10, 30]
    assert merged.mixed
    for i, own in enumerate(calls):
        assert torch.equal(results[i], own.leaves[0])


def test_a_timestep_without_dimensions_becomes_one_entry_per_row():
    target = Echo(lambda x, timestep: x * timestep.view(-1, 1))
    calls = [call(target, labelled(i, i), timestep=torch.tensor(float(i))) for i in (1, 2)]
    merged = MergedCall(calls, Axes((0, None), (0,)))
    results = dict(zip(merged.order, merged.run(), strict=True))
    assert target.calls[0][1]["timestep"].tolist() == [2, 2, 1]
    assert torch.equal(results[1], labelled(2, 2) * 2)


@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    axis=st.integers(0, 2),
    each=st.integers(1, 3),
    listed=st.booleans(),
)
def test_splitting_is_the_inverse_of_merging(rows, axis, each, listed):
    """For any row counts, batch axis, and several batch entries per row (frames times samples)."""
    target = Echo(lambda x, extra: (x, {"again": extra}))
    calls, noise = [], torch.Generator().manual_seed(0)
    for r in rows:
        shape = [2, 3, 2]
        shape[axis] = r
        wide = [2, 3, 2]
        wide[axis] = r * each
        extra = torch.randn(wide, generator=noise)
        calls.append(call(target, torch.randn(shape, generator=noise), extra=[extra, extra + 1] if listed else extra))
    own_axis = (axis, axis) if listed else axis
    merged = MergedCall(calls, Axes((axis, own_axis), (axis, own_axis)))
    results = merged.run()
    assert len(target.calls) == 1
    for i, (x, other) in zip(merged.order, results, strict=True):
        assert torch.equal(x, calls[i].leaves[0])
        theirs = calls[i].leaves[1]
        pairs = zip(other["again"], theirs, strict=True) if listed else [(other["again"], theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)


@given(rows=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_lists_with_one_entry_per_row(rows):
    target = Echo(lambda xs: [x + 1 for x in xs])
    calls = [call(target, [torch.full((2,), 10.0 * i + r) for r in range(count)]) for i, count in enumerate(rows)]
    merged = MergedCall(calls, Axes(("rows",), ("rows",)))
    for i, entries in zip(merged.order, merged.run(), strict=True):
        assert [e[0].item() for e in entries] == [10.0 * i + r + 1 for r in range(rows[i])]


def test_results_can_be_updated_in_place():
    target = Echo()
    merged = MergedCall([call(target, labelled(i, 2)) for i in (1, 2, 3)], Axes((0,), (0,)))
    results = merged.run()
    results[0].mul_(0)
    assert results[1][:, 0].tolist() == [20, 21]
    assert results[2][:, 0].tolist() == [30, 31]


@pytest.mark.parametrize(
    "result", [lambda x: x[:-1], lambda x: object(), lambda x: (x, x)], ids=["rows", "opaque", "more"]
)
def test_what_has_no_rows_cannot_be_split(result):
    merged = MergedCall([call(Echo(result), labelled(i, 2)) for i in (1, 2)], Axes((0,), (0,)))
    merged.target = Echo(result)
    with pytest.raises(Unsplittable):
        merged.run()


AXES = Axes((0, None), (0,))


def key(*args: Any, **kwargs: Any) -> Any:
    made = call(Echo(), *args, **kwargs)
    return Merger().key(made, AXES)


IDS = torch.arange(4)


def test_keys_keep_apart_what_must_not_merge():
    base = key(labelled(1, 2), IDS, scale=1.0)
    assert key(labelled(2, 3), IDS.clone(), scale=1.0) == base, "rows and identity do not matter"
    assert key(labelled(1, 2, width=3), IDS, scale=1.0) != base, "sizes do"
    assert key(labelled(1, 2), IDS + 1, scale=1.0) != base, "the content of shared tensors does"
    assert key(labelled(1, 2), IDS, scale=2.0) != base, "scalars do"
    assert key(labelled(1, 2), IDS, scale=1) != base, "and their types"
    assert key(labelled(1, 2), IDS, scale=1.0, shapes=[(1, 2, 4)]) != key(
        labelled(1, 2), IDS, scale=1.0, shapes=[(1, 4, 2)]
    )
    assert key(labelled(1, 2).half(), IDS, scale=1.0) != base, "dtypes do"


def test_shared_contents_are_hashed_once_and_again_after_an_update():
    contents, tensor = Contents(), torch.arange(5)
    before = contents.token(tensor)
    assert contents.token(tensor) is before
    assert contents.token(tensor.clone()) == before
    tensor[0] = 7
    assert contents.token(tensor) != before


def test_contents_forget_tensors_that_are_gone():
    contents = Contents()
    contents.token(torch.arange(3))
    assert not contents._tokens


@dataclasses.dataclass
class Plain:
    x: int


def test_flatten_and_unflatten_are_inverse():
    from transformers.modeling_outputs import BaseModelOutput

    opaque = Plain(1)
    tensor = torch.ones(2)
    value = ((tensor, [tensor, tensor], {"a": None, "b": [1, "x", (2.5, tensor)]}), {"o": opaque})
    leaves: list[Any] = []
    structure = flatten(value, leaves)
    again = unflatten(structure, leaves)
    assert again[1]["o"] is opaque
    assert again[0][2]["b"][:2] == [1, "x"]
    assert again[0][1][1] is tensor
    outputs: list[Any] = []
    output = BaseModelOutput(last_hidden_state=tensor, hidden_states=(tensor, tensor))
    rebuilt = unflatten(flatten(output, outputs), outputs)
    assert type(rebuilt) is BaseModelOutput
    assert len(rebuilt.hidden_states) == 2


def test_patterns_forget_scalars_but_not_structure():
    def of(*args: Any, **kwargs: Any) -> Any:
        return pattern(call(Echo(), *args, **kwargs).structure)

    assert of(torch.ones(1, 2), scale=1.0) == of(torch.ones(5, 3), scale=2.0)
    assert of([torch.ones(1)]) == of([torch.ones(1), torch.ones(2)]), "a list's length is data"
    assert of(torch.ones(1, 2), scale=1.0) != of(torch.ones(1, 2), scale=None)
    assert of(torch.ones(1, 2)) != of(torch.ones(1))


def test_axes_are_what_doubled():
    one = Seen((((2, 3),), ((4, 5),), ((6,),), ((3, 2),)), (((1, 2),),))
    two = Seen((((4, 3),), ((4, 5),), ((6,),) * 2, ((3, 4),)), (((2, 2),),))
    leaves: list[Any] = [torch.ones(1), torch.ones(1), [torch.ones(1)], torch.ones(1)]
    assert compare(one, two, leaves) == Axes((0, None, "rows", 1), (0,))


@pytest.mark.parametrize("grown", [(3, 3), (4, 6), (2, 3, 1)], ids=str)
def test_anything_else_is_not_mergeable(grown):
    axes = compare(Seen((((2, 3),),), ()), Seen(((grown,),), ()), [torch.ones(1)])
    assert axes.reason is not None


def test_a_call_that_ignores_the_number_of_samples_is_not_mergeable():
    seen = Seen((((2, 3),),), ())
    assert compare(seen, seen, [torch.ones(1)]).reason == "no argument grows with the number of samples"


def test_guesses_take_multiples_of_the_first_tensors_rows():
    made = call(Echo(), torch.ones(2, 3), torch.ones(4, 1, 1), torch.ones(4, 1), torch.ones(3), torch.tensor(1.0))
    assert guess(made) == (0, 0, None, None, None)
    assert rows_of(made.leaves, Axes(guess(made))) == 2


def sized(target: Any, name: int, *sizes: Any) -> ModuleCall:
    """A call of as many rows as there are sizes."""
    return call(target, labelled(name, len(sizes)), sizes=list(sizes))


LISTED = Axes((0,), (0,), listed=frozenset({(1, 0)}))


def test_lists_of_values_that_grow_with_the_samples_are_found():
    def seen(*entries: Any) -> Seen:
        made = sized(Echo(), 1, *entries)
        return Seen((((len(entries), 2),),), (), made.structure)

    found = compare(seen((1, 2)), seen((1, 2), (1, 2)), [torch.ones(1, 2)])
    assert found == dataclasses.replace(LISTED, outputs=())
    one, two = (call(Echo(), labelled(1, rows), layers=[7, 8]).structure for rows in (1, 2))
    steady = compare(Seen((((1, 2),),), (), one), Seen((((2, 2),),), (), two), [torch.ones(1, 2)])
    assert not steady.listed, "a list that stays as it is has no entries of rows"


def test_calls_of_other_numbers_of_rows_share_where_lists_hold_one_value():
    target, merger = Echo(), Merger()
    one, two, other = sized(target, 1, (1, 2)), sized(target, 2, (1, 2), (1, 2)), sized(target, 3, (2, 1))
    assert merger.key(one, LISTED) == merger.key(two, LISTED) != merger.key(other, LISTED)
    plain = dataclasses.replace(LISTED, listed=frozenset())
    assert merger.key(one, plain) != merger.key(two, plain), "unless nobody knows that they are of the rows"
    merged = MergedCall([one, two], LISTED)
    merged.run()
    assert target.calls[0][1]["sizes"] == [(1, 2)] * 3
    assert merged.kind == MergedCall([two, sized(target, 4, (1, 2))], LISTED).kind, "row counts are no part of the kind"


def test_entries_that_differ_follow_their_rows():
    target = Echo()
    MergedCall([sized(target, i, (1, 2), (2, 1)) for i in (1, 2)], LISTED).run()
    assert target.calls[0][1]["sizes"] == [(1, 2), (1, 2), (2, 1), (2, 1)]
    mixed = Merger().key(sized(target, 1, (1, 2), (2, 1)), LISTED)
    assert mixed != Merger().key(sized(target, 1, (1, 2), (1, 2)), LISTED)


def test_patterns_forget_how_many_values_a_list_holds():
    one, two = sized(Echo(), 1, (1, 2)), sized(Echo(), 2, (3, 4), (5, 6))
    assert pattern(one.structure) == pattern(two.structure)
    assert pattern(one.structure) != pattern(sized(Echo(), 1, (1, 2.0)).structure)


def test_a_list_of_shared_tensors_does_not_count_as_grown():
    seen = Seen((((2, 3),), ((4,),)), ())
    assert compare(seen, seen, [torch.ones(1), [torch.ones(1)]]).reason == NOTHING_GREW


def test_calls_with_unlike_numbers_of_entries_for_each_row_are_kept_apart():
    """One row of an argument for both rows of another: merged it would fail, and nobody of its kind share any more."""
    axes, target = Axes((0, 0)), Echo()

    def made(name: int, rows: int, entries: int) -> ModuleCall:
        return call(target, labelled(name, rows), extra=labelled(name, entries))

    like, other = [made(1, 1, 1), made(2, 2, 2)], [made(3, 2, 1), made(4, 2, 1)]
    keys = [Merger().key(one, axes) for one in (*like, *other, made(5, 1, 2))]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert keys[4] not in keys[:4]
    plain = [made(1, 1, 1), made(2, 1, 1)]
    assert MergedCall(plain, axes).kind != MergedCall(other, axes).kind
    frames = [MergedCall([made(1, 1, n), made(2, 1, n)], axes).kind for n in (4, 8)]
    assert frames[0] == frames[1], "how many there are for each row is no part of the kind"


def test_lists_with_unlike_numbers_of_entries_for_each_row_are_kept_apart():
    axes = Axes((0, "rows"))
    keys = [
        Merger().key(call(Echo(), labelled(1, rows), extra=[torch.ones(2)] * count), axes)
        for rows, count in ((1, 1), (2, 2), (2, 4))
    ]
    assert keys[0] == keys[1] != keys[2]
