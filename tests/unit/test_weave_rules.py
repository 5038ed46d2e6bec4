"""Rules of families: text padded with a mask, one row repeated for all, caches taken apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from steploom.weave.axes import Axes
from steploom.weave.batching.merge_keys import Merger
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import Leaf, ModuleCall, flatten, has_cache, has_opaque, unflatten
from steploom.weave.forms import formed_call
from steploom.weave.ragged.text import OneForAll, RaggedFrames, RaggedLayers, RaggedText


class Module:
    """Stands for a shared module: notes what it was called with, and gives back the first argument by name."""

    def __init__(self, rule: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.name, self.key, self.method, self.module = "transformer", "own", "forward", self
        self.group, self.ragged, self.language, self.adapted = "own", rule, None, None

    def invoke(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return next(iter(kwargs.values()))


def call(target: Any, **kwargs: Any) -> ModuleCall:
    return ModuleCall(target, (), kwargs)


def merged(*calls: ModuleCall, axes: Axes) -> tuple[Any, MergedCall]:
    """What the module was given for all of them at once."""
    assert len({Merger().key(one, axes) for one in calls}) == 1
    made = MergedCall(calls, axes)
    made.run()
    return calls[0].target.calls[-1], made


def text(rows: int, length: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + rows * length).view(rows, length, 1)


def test_text_of_one_row_is_repeated_for_all_of_a_calls() -> None:
    """One negative prompt for two prompts: the pipeline leaves it to the module to repeat it."""
    target = Module(RaggedText("text", "mask"))
    both = call(target, hidden_states=torch.zeros(2, 4), text=text(1, 3), mask=None)
    one = call(target, hidden_states=torch.zeros(1, 4), text=text(1, 2), mask=None)
    given, made = merged(both, one, axes=Axes((0, 0)))
    assert made.rows == [2, 1]
    assert given["text"].squeeze(2).tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 0]]
    assert given["mask"].tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    both.run()
    assert target.calls[-1]["text"].shape == (1, 3, 1), "alone it is called as the pipeline calls it"


def test_what_is_repeated_is_no_form() -> None:
    """Its leaves are not the arguments, so the next call cannot be compared with them."""
    target = Module(OneForAll(("face",)))
    forms: OrderedDict[Any, Any] = OrderedDict()
    for rows, formed in ((2, False), (1, True)):
        arguments = {"hidden_states": torch.zeros(rows, 4), "face": torch.zeros(1, 4)}
        assert (formed_call(target, (), arguments, forms).form is not None) == formed


@pytest.mark.parametrize("listed", [False, True])
def test_each_calls_one_row_goes_to_its_own_rows(listed: bool) -> None:
    target = Module(OneForAll(("face", "other")))
    faces = [torch.full((1, 2), float(i)) for i in (1, 2)]
    calls = [call(target, hidden_states=torch.zeros(2, 4), face=[one] if listed else one) for one in faces]
    given, _ = merged(*calls, axes=Axes((0, (0,) if listed else 0)))
    face = given["face"][0] if listed else given["face"]
    assert face[:, 0].tolist() == [1, 2, 1, 2], "branch-major"


def test_frames_get_a_mask_each() -> None:
    target = Module(RaggedFrames("text", "mask"))
    calls = [call(target, hidden_states=torch.zeros(1, 4, 2, 1, 1), text=text(1, length)) for length in (3, 1)]
    given, _ = merged(*calls, axes=Axes((0, 0)))
    assert given["mask"].shape == (4, 1, 3)
    assert (given["mask"].squeeze(1) < 0).tolist() == [[False] * 3] * 2 + [[False, True, True]] * 2


def layered(target: Any, length: int, *, ids: float = 0.0, hidden: int = 0, **others: Any) -> ModuleCall:
    """A call like FIBO's, the last ``hidden`` of its tokens masked."""
    kwargs = dict(others)
    if hidden:
        kwargs["attention_mask"] = (torch.arange(length + 2) % length < length - hidden).view(1, 1, 1, -1)
        kwargs["attention_mask"][..., length:] = True
    layer = text(1, length)
    return call(
        target, hidden_states=torch.zeros(1, 2, 4), text=text(1, length), text_encoder_layers=[layer, layer + 1, layer],
        txt_ids=torch.full((length, 3), ids), joint_attention_kwargs=kwargs or None,
    )  # fmt: skip


LAYERED = Axes((0, 0, (0, 0, 0), None))


def test_layers_ids_and_the_mask_within_are_padded() -> None:
    target = Module(RaggedLayers("text", "attention_mask"))
    masked = Axes((*LAYERED.inputs, 0))
    calls = [layered(target, 3), layered(target, 2), layered(target, 3, hidden=1)]
    each = [LAYERED, LAYERED, masked]
    keys = {Merger().key(one, own) for one, own in zip(calls, each, strict=True)}
    assert len(keys) == 1
    made = MergedCall(calls, LAYERED, each)
    made.run()
    given = target.calls[-1]
    assert given["text"].squeeze(2).tolist() == [[1, 2, 3], [1, 2, 0], [1, 2, 3]]
    assert [layer.squeeze(2).tolist()[1] for layer in given["text_encoder_layers"]] == [[1, 2, 0], [2, 3, 0], [1, 2, 0]]
    assert given["txt_ids"].shape == (3, 3)
    seen = given["joint_attention_kwargs"]["attention_mask"]
    assert seen.shape == (3, 1, 1, 5)
    assert seen.flatten(1).tolist() == [[True] * 5, [True, True, False, True, True], [True, True, False, True, True]]
    assert made.refill(calls)
    assert not made.refill([layered(target, 3), *calls[1:]]), "texts that were padded have changed"


def test_layers_merge_only_where_all_else_agrees() -> None:
    target, merger = Module(RaggedLayers("text", "attention_mask")), Merger()
    plain = merger.key(layered(target, 3), LAYERED)
    assert merger.key(layered(target, 2), LAYERED) == plain
    assert merger.key(layered(target, 2, ids=1.0), LAYERED) != plain, "positions that padding would not have"
    assert merger.key(layered(target, 2, scale=0.5), LAYERED) != plain, "the other entries beside the mask"


def glm(mode: str | None, *stored: float) -> GlmImageKVCache:
    cache = GlmImageKVCache(num_layers=2)
    cache.set_mode(mode)
    for layer in cache.caches:
        layer.k_caches = [torch.full((1, 2, 1, 1), value) for value in stored]
        layer.v_caches = [torch.full((1, 2, 1, 1), -value) for value in stored]
    return cache


def taken_apart(cache: Any) -> tuple[list[Leaf], Any]:
    leaves: list[Leaf] = []
    return leaves, flatten(cache, leaves)


def test_a_cache_that_is_read_has_rows() -> None:
    target = Module(None)
    calls = [call(target, hidden_states=torch.zeros(1, 4), cache=glm("read", value)) for value in (1.0, 2.0)]
    given, _ = merged(*calls, axes=Axes((0, *[(0,)] * 4)))
    for layer in given["cache"].caches:
        keys, values = layer.get(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
        assert keys[:, :2].flatten(1).tolist() == [[1, 1], [2, 2]]
        assert values[:, :2].flatten(1).tolist() == [[-1, -1], [-2, -2]]


@pytest.mark.parametrize(("stored", "rows"), [([1.0], 2), ([1.0, 2.0], 1)])
def test_one_samples_cache_goes_to_all_rows_and_several_to_their_own(stored: list[float], rows: int) -> None:
    target = Module(OneForAll(("cache",)))
    own = glm("read", *stored)
    made = call(target, hidden_states=torch.zeros(2, 4), cache=own).plain[1]["cache"]
    assert [[keys.shape[0] for keys in layer.k_caches] for layer in made.caches] == [[rows] * len(stored)] * 2
    assert [keys.shape[0] for keys in own.caches[0].k_caches] == [1] * len(stored), "the request's own stays as it is"


def test_what_a_cache_holds_and_is_not_read_is_left_out() -> None:
    """GLM-Image makes its unguided call with the same cache, to be skipped."""
    leaves, structure = taken_apart(glm("skip", 1.0))
    assert not leaves
    assert unflatten(structure, leaves).caches[0].mode == "skip"


def test_a_cache_that_is_written_is_its_requests_own() -> None:
    cache = glm("write")
    leaves, structure = taken_apart(cache)
    assert has_opaque(structure)
    assert unflatten(structure, leaves).caches[0] is cache.caches[0]
    assert not has_opaque(taken_apart(glm(None))[1])


def test_caches_are_made_anew_from_their_tensors() -> None:
    cache = Flux2KVCache(1, 2)
    cache.num_ref_tokens = 7
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(torch.ones(1, 2), torch.zeros(1, 2))
    leaves, structure = taken_apart(cache)
    again = unflatten(structure, leaves)
    assert type(again) is Flux2KVCache
    assert (again.num_ref_tokens, len(leaves)) == (7, 6)
    assert again.single_block_caches[1].get()[0] is cache.single_block_caches[1].k_ref
    cache.clear()
    assert again.get_double(0).k_ref is not None
    assert has_cache(structure)
    assert not has_cache(taken_apart([torch.ones(1)])[1])


def test_rows_of_a_cache_do_not_keep_their_mates_memory() -> None:
    def result(**kwargs: Any) -> Any:
        cache = Flux2KVCache(1, 0)
        cache.get_double(0).store(kwargs["x"] + 1, kwargs["x"] + 2)
        return kwargs["x"], cache

    target = Module(None)
    target.invoke = result
    made = MergedCall([call(target, x=torch.full((1, 2), float(i))) for i in (1, 2)], Axes((0,)))
    for i, (_, cache) in enumerate(made.run()):
        keys = cache.get_double(0).k_ref
        assert keys.tolist() == [[i + 2, i + 2]]
        assert keys.untyped_storage().nbytes() == keys.nbytes
