"""A pretended diffusion language model: words that come from prompt and seed."""

from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace

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


class TextModel:
    """A diffusion language model whose words come from prompt and seed."""

    def info(self) -> PipelineInfo:
        """The pipeline."""
        return PipelineInfo(
            pipeline_class="FakeTextPipeline",
            parameters=[Parameter(name) for name in PARAMETERS],
            default_steps=STEPS,
            default_length=LENGTH,
            makes=["text"],
        )

    def said_to(self, request: DiffusionRequest) -> str:
        """The prompt, or all messages, one a line."""
        messages: list[dict[str, str]] = request.params.get("messages") or []
        return "\n".join(message["content"] for message in messages) if messages else str(request.prompt)

    def total_steps(self, request: DiffusionRequest) -> int:
        """Steps of all blocks."""
        _, block, steps = _sizes(request)
        return -(-len(self._tokens(request)) // block) * steps

    def tell(self, report: RequestReport, request: DiffusionRequest) -> None:
        """What the step settled, or what is likely."""
        _, block, steps = _sizes(request)
        tokens = self._tokens(request)
        place = (report.step - 1) // steps * block
        report.stage, report.total_steps = f"block {place // block + 1}", None
        part = tokens[place : place + block]
        told = len(self.said_to(request).split())
        rows = TextRows([_text(part, first=not place)], [part], told, part[-1:] == [_END])
        if report.step % steps == 0:
            report.commit = rows
        elif request.draft_every and report.step % request.draft_every == 0:
            report.draft = rows

    def finish(self, report: RequestReport, request: DiffusionRequest) -> None:
        """The whole text."""
        tokens = self._tokens(request)
        report.output = SimpleNamespace(texts=[_text(tokens, first=True)], sequences=[tokens])

    def _tokens(self, request: DiffusionRequest) -> list[int]:
        said = self.said_to(request)
        draw = random.Random(hashlib.sha256(f"{said}|{request.seed}".encode()).digest())
        tokens = [draw.randrange(_END) for _ in range(_sizes(request)[0])]
        return [*tokens[:2], _END] if said.startswith(SHORT) and len(tokens) > 2 else tokens


def _sizes(request: DiffusionRequest) -> tuple[int, int, int]:
    given = request.params
    return (
        given.get("gen_length") or LENGTH, given.get("block_length") or BLOCK, given.get("num_inference_steps") or STEPS
    )  # fmt: skip


def _text(tokens: list[int], *, first: bool) -> str:
    text = "".join(f" {_WORDS[token]}" for token in tokens if token != _END)
    return text[1:] if first else text
