"""Transcripts: text that was told stays, whatever the tokenizer does to the end of a text."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploom.weave.text import TextWatch
from steploom.weave.transcript import Transcript

END = 2
TEXTS = ("Grüße, 世界! 🌍🌍", "plain", "ends in 🌍", "", "do n't ' stop . now ?")


class Bytes:
    """A tokenizer of bytes: id 3 + byte; smaller ids are special."""

    def __init__(self, *, tidies: bool = False) -> None:
        self.clean_up_tokenization_spaces = tidies

    def ids(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def batch_decode(self, rows: list[Any], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        texts = [bytes([i - 3 for i in row.tolist() if i >= 3]).decode(errors="replace") for row in rows]
        return list(map(self._tidied, texts)) if self.clean_up_tokenization_spaces else texts

    @staticmethod
    def _tidied(text: str) -> str:
        for rough, smooth in ((" .", "."), (" ?", "?"), (" ' ", "'"), (" n't", "n't")):  # as transformers does
            text = text.replace(rough, smooth)
        return text


def transcript(tokenizer: Any, *, end: int | None = END) -> tuple[TextWatch, Transcript]:
    watch = TextWatch({"eos_token_id": None})
    return watch, Transcript(watch, SimpleNamespace(tokenizer=tokenizer, eos_token_id=end))


@pytest.mark.parametrize("tidies", [False, True])
@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 40), max_size=6))
def test_commits_make_the_text_however_it_is_cut(tidies: bool, text: str, cuts: list[int]) -> None:
    tokenizer = Bytes(tidies=tidies)
    ids = tokenizer.ids(text)
    watch, told = transcript(tokenizer)
    whole, tokens = "", []
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, stop in itertools.pairwise(edges):
        watch.settled = [ids[:stop]]
        watch.likely = torch.tensor([ids[stop:]], dtype=torch.long)
        commit, draft = told.commit(), told.draft()
        assert commit is not None
        assert draft is not None
        assert commit.texts is not None
        assert "\ufffd" not in commit.texts[0]
        whole += commit.texts[0]
        tokens += commit.tokens[0]
        assert commit.tokens == [ids[start:stop]]
        final = tokenizer.batch_decode([torch.tensor(ids)], True)[0]
        assert draft.texts == [final[len(whole) :]], "the rest was guessed right"
    watch.settled = watch.settled or [[]]
    last = told.commit(last=True)
    whole += last.texts[0] if last is not None and last.texts is not None else ""
    assert whole == tokenizer.batch_decode([torch.tensor(ids, dtype=torch.long)], True)[0]
    assert tokens == ids


def test_a_row_ends_at_its_first_end_and_others_go_on() -> None:
    tokenizer = Bytes()
    watch, told = transcript(tokenizer)
    watch.settled = [[*tokenizer.ids("ab"), END, *tokenizer.ids("zz")], tokenizer.ids("cdefg")]
    watch.likely = torch.tensor([tokenizer.ids("!"), tokenizer.ids("h")])
    commit, draft = told.commit(), told.draft()
    assert commit is not None
    assert commit.texts == ["ab", "cdefg"]
    assert commit.tokens == [[*tokenizer.ids("ab"), END], tokenizer.ids("cdefg")]
    assert draft is not None
    assert draft.texts == ["", "h"]
    assert draft.tokens == [[], tokenizer.ids("h")]
    assert told.commit() is None, "there is nothing new"


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    watch, told = transcript(None, end=None)
    assert told.commit() is None
    watch.settled, watch.likely = [[5, 6]], torch.tensor([[7]])
    commit, draft = told.commit(), told.draft()
    assert commit is not None
    assert (commit.texts, commit.tokens) == (None, [[5, 6]])
    assert draft is not None
    assert (draft.texts, draft.tokens) == (None, [[7]])
    assert told.commit(last=True) is None


def test_a_tokenizer_that_changes_its_mind_takes_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    class Fickle(Bytes):
        def batch_decode(self, rows: list[Any], skip_special_tokens: bool) -> list[str]:
            return [text.upper() if len(text) > 3 else text for text in super().batch_decode(rows, skip_special_tokens)]

    tokenizer = Fickle()
    watch, told = transcript(tokenizer)
    watch.settled = [tokenizer.ids("abc")]
    assert told.commit() is not None
    watch.settled = [tokenizer.ids("abcdef")]
    commit = told.commit()
    assert commit is not None
    assert commit.texts == [""]
    last = told.commit(last=True)
    assert last is not None
    assert last.texts == ["DEF"]
    assert "has changed text that was told" in caplog.text
