"""The events of a language model's text, of what a worker reports."""

from __future__ import annotations

from typing import Any

from steploom.protocol import RequestReport, TextRows
from steploom.requests import Commit, Draft, Event


def texts(request_id: str, report: RequestReport) -> list[Event]:
    """What a tick has added to the text of the request: what is settled, then what is likely."""
    events: list[Event] = []
    if report.commit is not None:
        events.append(_committed(request_id, report.commit))
    if report.draft is not None:
        events.append(_drafted(request_id, report.draft))
    return events


def _committed(request_id: str, rows: TextRows) -> Commit:
    text, tokens = _rows(rows)
    return Commit(
        request_id=request_id, text=text, tokens=tokens, prompt_tokens=rows.prompt_tokens, ended=rows.ended
    )  # fmt: skip


def _drafted(request_id: str, rows: TextRows) -> Draft:
    text, tokens = _rows(rows)
    return Draft(request_id=request_id, text=text, tokens=tokens)


def _rows(rows: TextRows) -> tuple[str | list[str] | None, list[Any]]:
    """Text and tokens of one row as they are, of several as lists."""
    texts, tokens = rows.texts, rows.tokens
    if len(tokens) == 1:
        return None if texts is None else texts[0], list(tokens[0])
    return texts, list(tokens)
