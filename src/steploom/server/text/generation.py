"""TextGeneration: the texts of one HTTP request, each a request of the engine, told piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from anyio.abc import TaskGroup

from steploom import AsyncDiffusionEngine, Commit, DiffusionOutput, DiffusionRequest, InvalidRequest, Restarted
from steploom.requests import Event
from steploom.server.errors import ApiError, invalid
from steploom.server.generation import Generation
from steploom.server.running import Running
from steploom.server.text.fields import TextFields, param_of
from steploom.server.text.stops import Stops
from steploom.telemetry.outcomes import ENOUGH

Reason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """The engine has taken one of the texts up."""

    choice: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one of the texts has grown by, for good."""

    choice: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """One of the texts is whole.

    Attributes:
        choice: Which of the texts, from 0.
        reason: ``stop``: the model ended it, or a stop sequence; ``length``: there was no more room.
        tokens: Of the text.
        prompt_tokens: Of what it follows.
        seed: Of the text.
    """

    choice: int
    reason: Reason
    tokens: int
    prompt_tokens: int
    seed: int | None


@dataclasses.dataclass(frozen=True)
class AllDone:
    """All of the texts are whole: their tokens are counted."""


class TextGeneration(Generation):
    """The texts of one HTTP request. Its log has :class:`Opened`, :class:`Piece`, :class:`Done` and :class:`AllDone`.

    Args:
        fields: What was asked for.
        requests: One request of the engine for each text, ``n`` for each prompt.
        answer_id: What the answer is called.
        model: What the model is called.
    """

    def __init__(self, fields: TextFields, requests: Sequence[DiffusionRequest], *, answer_id: str, model: str) -> None:
        super().__init__(requests, stream=fields.stream)
        self.fields = fields
        self.answer_id = answer_id
        self.model = model
        self._open = len(requests)

    def _param_of(self, error: InvalidRequest) -> str | None:
        return param_of(error, self.fields)

    async def _one(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        """Makes one text. Once a stop sequence is there the engine's request is left, and its slot is free."""
        growth = Growth(self.fields.stop)
        with running.entered(request) as entry:
            async with engine.stream(request) as stream:
                self._accept()
                if self.fields.messages is not None:
                    self._add(Opened(index))
                async for event in stream:
                    entry.see(event)
                    self._tell(index, growth.hear(event))
                    if growth.stopped:
                        ENOUGH.set(True)  # of this task, which ends with the request
                        break
                else:
                    output = await stream.result()
                    entry.done(output)
                    self._tell(index, growth.finish(output))
        self._add(
            Done(choice=index, reason=growth.reason, tokens=growth.tokens, prompt_tokens=growth.prompt_tokens,
                 seed=request.seed)
        )  # fmt: skip
        self._open -= 1
        if not self._open and self.fields.include_usage:
            self._add(AllDone())

    def _tell(self, index: int, text: str) -> None:
        if text:
            self._add(Piece(index, text))


class Growth:
    """One text as the engine's events tell it. A replayed request tells its beginning again, which was told.

    Args:
        stop: Stop sequences.

    Attributes:
        tokens: Settled so far.
        prompt_tokens: Of what the text follows, once known.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stops = Stops(stop)
        self._ended = False
        self._length = self._told = 0
        self.tokens = self.prompt_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was there."""
        return self._stops.found

    @property
    def reason(self) -> Reason:
        """Why the text ended where it did."""
        return "stop" if self.stopped or self._ended else "length"

    def hear(self, event: Event) -> str:
        """What of the text is new with ``event``, and may be told."""
        if isinstance(event, Restarted):
            self._length = self.tokens = 0
        if not isinstance(event, Commit):
            return ""
        if not isinstance(event.text, str):
            raise invalid("model: has no tokenizer, so it gives no text", "model", "unsupported_model")
        self.tokens += len(event.tokens)
        self.prompt_tokens = event.prompt_tokens or 0
        self._ended = event.ended
        return self._grow(event.text)

    def finish(self, output: DiffusionOutput) -> str:
        """What is left to be told.

        Raises:
            ApiError: 400: the model gives no text.
        """
        if not output.has("text"):
            raise ApiError(400, "this model makes no text", param="model", code="unsupported_model")
        whole = output.text
        text = whole if isinstance(whole, str) else whole[0]
        last = self._grow(text[self._length :])  # of an executor that tells nothing on the way
        return last if self.stopped else last + self._stops.rest()

    def _grow(self, text: str) -> str:
        known = max(0, self._told - self._length)
        self._length += len(text)
        self._told = max(self._told, self._length)
        return self._stops.add(text[known:])
