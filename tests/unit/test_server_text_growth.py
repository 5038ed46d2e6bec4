"""Texts that grow towards a client: cut at stop sequences, told once although a request is replayed."""

from __future__ import annotations

import itertools

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploom import Commit, DiffusionOutput, Restarted
from steploom.outputs import Timings
from steploom.server.errors import ApiError
from steploom.server.text.fields import IGNORED, INERT, LENGTHS, OPENAI, PARAMS
from steploom.server.text.generation import Growth
from steploom.server.text.stops import Stops


def cut(text: str, sequences: list[str]) -> str:
    """Letter by letter: where the first sequence is complete, its beginning is the end."""
    for end in range(len(text) + 1):
        starts = [end - len(one) for one in sequences if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 12), max_size=6),
)  # fmt: skip
def test_where_a_text_is_cut_does_not_depend_on_its_pieces(text: str, sequences: list[str], cuts: list[int]) -> None:
    stops, told = Stops(sequences), ""
    for start, end in itertools.pairwise(sorted({0, len(text), *(place for place in cuts if place < len(text))})):
        told += stops.add(text[start:end])
        assert cut(text, sequences).startswith(told)  # nothing is ever taken back
        assert told == cut(text[:end], sequences)[: len(told)]
    assert told + stops.rest() == cut(text, sequences)
    assert stops.found == any(one in text for one in sequences)


def test_a_replayed_beginning_is_told_once() -> None:
    def commit(text: str, *, ended: bool = False) -> Commit:
        return Commit(request_id="r", text=text, tokens=[1] * len(text), prompt_tokens=7, ended=ended)

    growth = Growth(())
    heard = [growth.hear(event) for event in (
        commit("abc"), commit("de"), Restarted(request_id="r", attempt=1), commit("ab"), commit("cdef"),
        commit("g", ended=True),
    )]  # fmt: skip
    assert heard == ["abc", "de", "", "", "f", "g"]
    assert (growth.tokens, growth.prompt_tokens, growth.reason) == (7, 7, "stop")
    output = DiffusionOutput(request_id="r", output={"texts": ["abcdefgh"]}, timings=Timings(), texts=["abcdefgh"])
    assert growth.finish(output) == "h"


def test_a_model_without_a_tokenizer_gives_no_text() -> None:
    with pytest.raises(ApiError) as caught:
        Growth(()).hear(Commit(request_id="r", text=None, tokens=[1]))
    assert caught.value.param == "model"


def test_every_field_of_the_sdk_is_known() -> None:
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats

    known = {*OPENAI, *PARAMS, *IGNORED, *INERT, *LENGTHS, "prompt", "messages", "seed", "logprobs", "stream_options"}
    for kind in (completions.CompletionCreateParamsBase, chats.CompletionCreateParamsBase):
        assert set(kind.__annotations__) <= known, openai.__version__
