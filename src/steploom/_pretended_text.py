"""What :class:`steploom.testing.FakeEngine` pretends of a language model: words that come from prompt and seed."""

from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace
from typing import Any

from steploom.protocol import Parameter, PipelineInfo, RequestReport, TextRows
from steploom.requests import DiffusionRequest

PARAMETERS = ("prompt", "messages", "use_chat_template", "gen_length", "block_length", "num_inference_steps",
              "temperature", "top_p", "top_k")  # fmt: skip
LENGTH, BLOCK, STEPS = 16, 4, 2
"""Tokens of a text, tokens of a block, steps of a block, where the request does not say."""

SHORT = "short"
"""A prompt that begins so gets a text that ends by itself, after three tokens."""

_WORDS = ("red", "blue", "a", "boat", "sea", "and", "old", "house", "by", "the", "star", "small", "on", "wide", "sky")
_END = len(_WORDS)
"""The end token; the others are words."""


def info() -> PipelineInfo:
    """The pipeline, as a worker would describe it."""
    return PipelineInfo(
        pipeline_class="FakeTextPipeline",
        parameters=[Parameter(name) for name in PARAMETERS],
        default_steps=STEPS,
        default_length=LENGTH,
        makes=["text"],
    )


def total_steps(request: DiffusionRequest) -> int:
    """Steps of all blocks."""
    _, block, steps = _sizes(request)
    return -(-len(_tokens(request)) // block) * steps


def said_to(request: DiffusionRequest) -> str:
    """The prompt, or all messages, one a line."""
    messages: list[dict[str, str]] = request.params.get("messages") or []
    return "\n".join(message["content"] for message in messages) if messages else str(request.prompt)


def tell(report: RequestReport, request: DiffusionRequest, done: int) -> None:
    """Adds to the report of step ``done`` what it settled, and what is likely."""
    _, block, steps = _sizes(request)
    tokens = _tokens(request)
    place = (done - 1) // steps * block
    report.stage, report.total_steps = f"block {place // block + 1}", None
    part = tokens[place : place + block]
    rows = TextRows([_text(part, first=not place)], [part], len(said_to(request).split()), part[-1:] == [_END])
    if done % steps == 0:
        report.commit = rows
    elif request.draft_every and done % request.draft_every == 0:
        report.draft = rows


def output(request: DiffusionRequest) -> Any:
    """What the pipeline returns."""
    tokens = _tokens(request)
    return SimpleNamespace(texts=[_text(tokens, first=True)], sequences=[tokens])


def _sizes(request: DiffusionRequest) -> tuple[int, int, int]:
    given = request.params
    return (
        given.get("gen_length") or LENGTH, given.get("block_length") or BLOCK, given.get("num_inference_steps") or STEPS
    )  # fmt: skip


def _tokens(request: DiffusionRequest) -> list[int]:
    said = said_to(request)
    draw = random.Random(hashlib.sha256(f"{said}|{request.seed}".encode()).digest())
    tokens = [draw.randrange(_END) for _ in range(_sizes(request)[0])]
    return [*tokens[:2], _END] if said.startswith(SHORT) and len(tokens) > 2 else tokens


def _text(tokens: list[int], *, first: bool) -> str:
    text = "".join(f" {_WORDS[token]}" for token in tokens if token != _END)
    return text[1:] if first else text
