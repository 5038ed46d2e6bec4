"""The shapes of OpenAI's answers: ``text_completion``, ``chat.completion`` and ``chat.completion.chunk``.

``seed`` beside each choice's ``finish_reason`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steploom.server.text.generation import AllDone, Done, Opened, Piece, TextGeneration

CLOSING = b"data: [DONE]\n\n"
"""What ends a stream."""

Entry = Opened | Piece | Done | AllDone


def is_chat(generation: TextGeneration) -> bool:
    """Whether messages are answered, rather than prompts gone on from."""
    return generation.fields.messages is not None


def whole(generation: TextGeneration) -> dict[str, Any]:
    """The answer in one piece."""
    done = sorted((entry for entry in generation.log if isinstance(entry, Done)), key=lambda entry: entry.choice)
    texts = [""] * len(done)
    for entry in generation.log:
        if isinstance(entry, Piece):
            texts[entry.choice] += entry.text
    choices: list[dict[str, Any]] = []
    for entry, text in zip(done, texts, strict=True):
        message = {"role": "assistant", "content": text, "refusal": None}
        said: dict[str, Any] = {"message": message} if is_chat(generation) else {"text": text}
        ended = {"finish_reason": entry.reason, "logprobs": None, "seed": entry.seed}
        choices.append({"index": entry.choice, **said, **ended})
    kind = "chat.completion" if is_chat(generation) else "text_completion"
    return {**_head(generation, kind), "choices": choices, "usage": _usage(generation, done)}


def chunk(generation: TextGeneration, entry: Entry) -> dict[str, Any]:
    """An entry of the log as the data of an event."""
    kind = "chat.completion.chunk" if is_chat(generation) else "text_completion"
    chunk = {**_head(generation, kind), "choices": [] if isinstance(entry, AllDone) else [_choice(generation, entry)]}
    if generation.fields.include_usage:
        counted = [one for one in generation.log if isinstance(one, Done)] if isinstance(entry, AllDone) else None
        chunk["usage"] = _usage(generation, counted) if counted is not None else None
    return chunk


def _choice(generation: TextGeneration, entry: Opened | Piece | Done) -> dict[str, Any]:
    text = entry.text if isinstance(entry, Piece) else ""
    delta: dict[str, Any] = {"content": text} if isinstance(entry, Piece) else {}
    if isinstance(entry, Opened):
        delta = {"role": "assistant", "content": ""}
    said: dict[str, Any] = {"delta": delta} if is_chat(generation) else {"text": text}
    choice = {"index": entry.choice, **said, "finish_reason": None, "logprobs": None}
    if isinstance(entry, Done):
        choice |= {"finish_reason": entry.reason, "seed": entry.seed}
    return choice


def _head(generation: TextGeneration, kind: str) -> dict[str, Any]:
    return {
        "id": generation.answer_id, "object": kind, "created": generation.created, "model": generation.model,
        "system_fingerprint": None,
    }  # fmt: skip


def _usage(generation: TextGeneration, done: Iterable[Done]) -> dict[str, int]:
    """Tokens of all texts, and of each prompt once."""
    made = given = 0
    for entry in done:
        made += entry.tokens
        given += entry.prompt_tokens if entry.choice % generation.fields.n == 0 else 0
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
