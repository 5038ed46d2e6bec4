"""Text that grows: what a diffusion language model's program has settled, and what it holds for likely, step by step.

A program refines one block of tokens after the other. A block is settled (*committed*) when the program turns to the
next one: what it holds then is read off its own module calls, so that whatever its noise scheduler, its early stops or
a callback did to the block is in it. Until then, what the noise scheduler sampled last is a *draft*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from steploom.weave.calls import ModuleCall
from steploom.weave.noise.observed import StepEnd

Tokens = list[list[int]]
"""Token ids, a list for each row."""


class TextWatch:
    """What one program's text is like. The subclasses know how a pipeline holds it.

    Args:
        arguments: Of the pipeline's ``__call__``, with its defaults.

    Attributes:
        blocks: How many blocks were begun.
        settled: Tokens that are settled, per row; what follows a row's end is the reader's to drop.
        likely: What the last step made of the block in progress, per row.
        prompt: Tokens of a row's prompt, padding included; None until that is known.
        inner: A component and the path of a module in it that is woven too, so that its calls are seen.
    """

    inner: ClassVar[tuple[str, str] | None] = None

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.blocks = 0
        self.settled: Tokens = []
        self.likely: torch.Tensor | None = None
        self.prompt: int | None = None

    @property
    def stage(self) -> str:
        """What the program is at."""
        return f"block {max(self.blocks, 1)}"

    @property
    def length(self) -> int:
        """How many tokens of each row are settled."""
        return len(self.settled[0]) if self.settled else 0

    def called(self, call: ModuleCall) -> None:
        """The program waits for ``call``."""
        raise NotImplementedError

    def stepped(self, end: StepEnd) -> None:
        """The program has done a step."""
        raise NotImplementedError

    def finished(self, output: Any) -> None:
        """The program is over: all of its text is settled."""
        sequences = getattr(output, "sequences", output[0] if isinstance(output, tuple) and output else None)
        if isinstance(sequences, torch.Tensor) and sequences.ndim == 2:
            self._settle(sequences[:, self.length :])
        self.likely = None

    def _settle(self, tokens: torch.Tensor) -> None:
        rows: Tokens = tokens.tolist()
        self.settled = [old + new for old, new in zip(self.settled, rows, strict=True)] if self.settled else rows
        self.likely = None


class SequenceText(TextWatch):
    """LLaDA 2: every call of the model carries the whole text up to the end of the block in progress."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self._width = 0
        self._prompt = 0

    def called(self, call: ModuleCall) -> None:
        """A wider call: the block at which the last one ended is settled."""
        ids = call.place(0)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] <= self._width:
            return
        if self.blocks:
            self._settle(ids[:, self._prompt + self.length : min(self._width, self._end)])
        self.blocks += 1
        self._width = ids.shape[1]

    def stepped(self, end: StepEnd) -> None:
        """Masks that are left are drawn as they were sampled."""
        sampled, block = getattr(end.result, "sampled_tokens", None), end.latents
        if sampled is None or not isinstance(block, torch.Tensor):
            return
        start = self._width - block.shape[1]
        if self.blocks == 1 and not self.length:
            mask = end.given.get("prompt_mask")
            self._prompt = self.prompt = start + (0 if mask is None else int(mask.sum()))
        filled = torch.where(block == end.given.get("mask_token_id"), sampled, block)
        self.likely = filled[:, max(self._prompt - start, 0) : max(self._end - start, 0)]

    @property
    def _end(self) -> int:
        """Where the text will end."""
        length = self.arguments.get("gen_length")
        return self._prompt + length if isinstance(length, int) else self._width


class CanvasText(TextWatch):
    """DiffusionGemma: before each block an encoder reads what is new, first the prompt and then the last canvas."""

    ENCODER = ("model", "model.encoder")
    inner = ENCODER

    def called(self, call: ModuleCall) -> None:
        """A call of the encoder: what it reads is settled, if it is not the prompt."""
        if call.target.name != ".".join(self.ENCODER):
            return
        ids = call.argument("input_ids")
        if self.blocks:
            self._settle(ids)
        else:
            self.prompt = ids.shape[1]
        self.blocks += 1

    def stepped(self, end: StepEnd) -> None:
        """The canvas itself holds noise where nothing is decided: what was sampled is the better guess."""
        self.likely = getattr(end.result, "sampled_tokens", None)


WATCHES: dict[str, type[TextWatch]] = {"LLaDA2Pipeline": SequenceText, "DiffusionGemmaPipeline": CanvasText}
"""By pipeline, or its base class."""


def watch_for(pipeline: object) -> type[TextWatch] | None:
    """How the text of ``pipeline`` is watched; None if it is no language model."""
    return next((WATCHES[base.__name__] for base in type(pipeline).__mro__ if base.__name__ in WATCHES), None)
