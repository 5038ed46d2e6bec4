"""Transcripts: tokens to text, such that text which was told is never taken back."""

from __future__ import annotations

import logging
from typing import Any

import torch

from steploom.protocol import TextRows
from steploom.weave.text import TextWatch, Tokens

log = logging.getLogger(__name__)

_UNFINISHED = "\ufffd"
"""What tokenizers make of the first bytes of a character."""


class Transcript:
    """The text of one request, as far as it was told.

    Rows end at their first end-of-sequence token, as the pipeline cuts them; special tokens are left out, as it does.
    The tail of what is settled is held back while a later token may still change it: the first bytes of a character,
    and the last words where the tokenizer tidies up spaces.

    Args:
        watch: What the program says.
        pipeline: Whose tokenizer (or processor) decodes; one without tells tokens only.
    """

    def __init__(self, watch: TextWatch, pipeline: Any) -> None:
        self._watch = watch
        self._decoder: Any = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "processor", None)
        end = watch.arguments.get("eos_token_id")
        self._end: int | None = getattr(pipeline, "eos_token_id", None) if end is None else end
        self._tidies = bool(getattr(self._tokenizer, "clean_up_tokenization_spaces", False))
        self._told_tokens: list[int] = []
        self._told: list[str] = []

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._decoder, "tokenizer", self._decoder)

    def commit(self, texts: list[str] | None = None, *, last: bool = False) -> TextRows | None:
        """Text and tokens, per row, that were settled since the last call of this; None if there are none.

        Args:
            texts: The pipeline's own texts, once it is done.
            last: Nothing will follow: nothing is held back.
        """
        rows = [self._ended(row) for row in self._watch.settled]
        if not rows:
            return None
        told = self._told_tokens or [0] * len(rows)
        tokens = [row[done:] for row, done in zip(rows, told, strict=True)]
        if not last and not any(tokens):
            return None
        self._told_tokens = [len(row) for row in rows]
        if self._decoder is None:
            return self._piece(None, tokens, rows) if any(tokens) else None
        whole = self._decode(rows) if texts is None else texts
        self._told = self._told or [""] * len(rows)
        news = [self._news(text, i, last=last or self._over(rows[i])) for i, text in enumerate(whole)]
        self._told = [old + new for old, new in zip(self._told, news, strict=True)]
        return self._piece(news, tokens, rows) if any(news) or any(tokens) else None

    def _piece(self, news: list[str] | None, tokens: Tokens, rows: Tokens) -> TextRows:
        return TextRows(news, tokens, self._watch.prompt, all(map(self._over, rows)))

    @property
    def told(self) -> list[str] | None:
        """The text that was told so far, per row; None if nothing can be decoded."""
        return None if self._decoder is None else list(self._told)

    def draft(self) -> TextRows | None:
        """What is likely to follow what was told, per row; None if nothing is known."""
        if self._watch.likely is None:
            return None
        likely: Tokens = self._watch.likely.tolist()
        settled = [self._ended(row) for row in self._watch.settled] or [[] for _ in likely]
        rows = [old if self._over(old) else self._ended(old + new) for old, new in zip(settled, likely, strict=True)]
        tokens = [row[len(old) :] for row, old in zip(rows, settled, strict=True)]
        if self._decoder is None:
            return TextRows(None, tokens)
        told = self._told or [""] * len(rows)
        pairs = zip(self._decode(rows), told, strict=True)
        return TextRows([text[len(old) :] if text.startswith(old) else "" for text, old in pairs], tokens)

    def _news(self, text: str, row: int, *, last: bool) -> str:
        """What of ``text`` was not told yet and will stay."""
        told = self._told[row]
        stable = text if last else self._stable(text)
        if stable.startswith(told):
            return stable[len(told) :]
        if last:
            log.warning("the tokenizer has changed text that was told: %r became %r", told, text[: len(told)])
            return text[len(told) :]
        return ""

    def _stable(self, text: str) -> str:
        text = text.rstrip(_UNFINISHED)
        if self._tidies:  # " n" may become "n't", and " ' " may become "'"
            text = " ".join(text.split(" ")[:-2])
        return text

    def _decode(self, rows: Tokens) -> list[str]:
        return self._decoder.batch_decode(
            [torch.tensor(row, dtype=torch.long) for row in rows], skip_special_tokens=True
        )

    def _over(self, row: list[int]) -> bool:
        return self._end is not None and row[-1:] == [self._end]

    def _ended(self, row: list[int]) -> list[int]:
        """``row`` up to its first end-of-sequence token."""
        return row[: row.index(self._end) + 1] if self._end is not None and self._end in row else row
