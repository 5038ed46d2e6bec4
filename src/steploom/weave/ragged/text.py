"""Rules of rows and of text: how denoisers' arguments are made alike in rows and in length before calls are merged.

What they are is declared, family by family, in :mod:`steploom.weave.ragged.rules`; merges are verified like all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from steploom.weave import caches

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_HIDDEN = -10000.0
"""Added to the scores of tokens that are not to be seen, as diffusers does: in any dtype their weight is zero."""


@dataclasses.dataclass(frozen=True)
class OneForAll:
    """A denoiser that takes one row of some arguments for all rows of a call.

    Attributes:
        names: Keyword arguments: tensors, lists of tensors, or caches.
    """

    names: tuple[str, ...]

    def taken_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
        """The arguments with a row for each of the latents; None if they have it already."""
        rows = _rows(args, kwargs)
        changes = {name: _repeated(kwargs.get(name), rows) for name in self.names}
        changes = {name: value for name, value in changes.items() if value is not None}
        return (args, {**kwargs, **changes}) if changes else None


@dataclasses.dataclass(frozen=True)
class RaggedText:
    """How a denoiser's text argument is padded.

    Attributes:
        text: Keyword argument ``[rows, length, channels]``.
        mask: Keyword argument ``[rows, length]``, True for real tokens; made if it is None. None where the denoiser is
            told lengths by another argument.
    """

    text: str
    mask: str | None

    def taken_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
        """The arguments with text for each row, where one text stands for all (a negative prompt for many)."""
        names = (self.text,) if self.mask is None else (self.text, self.mask)
        return OneForAll(names).taken_apart(args, kwargs)

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the call has text that can be padded."""
        return isinstance(kwargs.get(self.text), torch.Tensor)

    def length(self, kwargs: Mapping[str, Any]) -> int:
        """The text's, in tokens."""
        return kwargs[self.text].shape[1]

    def given_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The mask that the pipeline gave."""
        return None if self.mask is None else kwargs.get(self.mask)

    def texts(self, kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors, and lists of tensors, that padding changes."""
        return [value for value in (kwargs[self.text], self.given_mask(kwargs)) if value is not None]

    def in_common(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """In place of those arguments: what calls have to agree in all the same."""
        masked = {} if self.mask is None else {self.mask: None}
        return {self.text: kwargs[self.text].shape[2:], **masked}

    def padded(self, kwargs: Mapping[str, Any], length: int) -> dict[str, Padded]:
        """Those arguments, zero-padded to ``length`` tokens, with a mask."""
        text = kwargs[self.text]
        changes = {self.text: Padded(_longer(text, length))}
        if self.mask is not None:
            changes[self.mask] = Padded(self._mask(kwargs, _longer(self._real(kwargs), length)))
        return changes

    def _real(self, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Which tokens are real ``[rows, length]``."""
        text, mask = kwargs[self.text], self.given_mask(kwargs)
        return text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)

    def _mask(self, kwargs: Mapping[str, Any], real: torch.Tensor) -> torch.Tensor:
        """The mask as the denoiser takes it."""
        return real


class Padded(NamedTuple):
    """A padded argument.

    Attributes:
        value: A tensor, a list of tensors, or a dict with one.
        rows: Whether its first axis are the rows; else all rows share it.
    """

    value: Any
    rows: bool = True


@dataclasses.dataclass(frozen=True)
class RaggedFrames(RaggedText):
    """Text that is shown to each frame of a video, with a mask ``[rows * frames, 1, length]`` to add to the scores.

    The pipeline gives none, and latents ``hidden_states [rows, channels, frames, height, width]``.
    """

    def _mask(self, kwargs: Mapping[str, Any], real: torch.Tensor) -> torch.Tensor:
        scores = (~real).to(kwargs[self.text].dtype) * _HIDDEN
        return scores.repeat_interleave(kwargs["hidden_states"].shape[2], dim=0).unsqueeze(1)


@dataclasses.dataclass(frozen=True)
class RaggedLayers(RaggedText):
    """Text that comes in layers, one for each block, and with position ids that are all zero.

    The mask ``[rows, 1, 1, length + pictures]`` is an entry of another argument; the pipeline gives none where it would
    hide nothing. ``hidden_states`` is ``[rows, pictures, channels]``.

    Attributes:
        within: Keyword argument, a dict or None: ``mask`` is its entry.
        layers: Keyword argument, a list of ``[rows, length, channels]``.
        ids: Keyword argument ``[length, axes]``.
    """

    within: str = "joint_attention_kwargs"
    layers: str = "text_encoder_layers"
    ids: str = "txt_ids"

    def taken_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The pipeline gives text for each row."""

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the ids are a text's whose tokens all stand at one place."""
        ids = kwargs.get(self.ids)
        return super().applies(kwargs) and isinstance(ids, torch.Tensor) and ids.ndim == 2 and not bool(ids.any())

    def given_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """As the pipeline gave it, over text and pictures."""
        return (kwargs.get(self.within) or {}).get(self.mask)

    def texts(self, kwargs: Mapping[str, Any]) -> list[Any]:
        """Text, mask, layers and ids."""
        return [*super().texts(kwargs), kwargs[self.layers], kwargs[self.ids]]

    def in_common(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Channels, and whatever else goes to the attention."""
        others = {name: value for name, value in (kwargs.get(self.within) or {}).items() if name != self.mask}
        channels = [layer.shape[2] for layer in kwargs[self.layers]]
        return {self.text: kwargs[self.text].shape[2:], self.layers: channels, self.ids: None, self.within: others}

    def padded(self, kwargs: Mapping[str, Any], length: int) -> dict[str, Padded]:
        """All of them."""
        real = _longer(self._real(kwargs), length)
        pictures = real.new_ones(real.shape[0], kwargs["hidden_states"].shape[1])
        mask = torch.cat([real, pictures], dim=1)[:, None, None, :]
        longer = {id(layer): _longer(layer, length) for layer in kwargs[self.layers]}  # some are there several times
        return {
            self.text: Padded(_longer(kwargs[self.text], length)),
            self.layers: Padded([longer[id(layer)] for layer in kwargs[self.layers]]),
            self.ids: Padded(pad(kwargs[self.ids], (0, 0, 0, length - self.length(kwargs))), rows=False),
            self.within: Padded({**(kwargs.get(self.within) or {}), self.mask: mask}),
        }

    def _real(self, kwargs: Mapping[str, Any]) -> torch.Tensor:
        text, mask = kwargs[self.text], self.given_mask(kwargs)
        if mask is None:
            return text.new_ones(text.shape[:2], dtype=torch.bool)
        return mask[:, 0, 0, : text.shape[1]].to(torch.bool)


def _longer(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """``tensor [rows, tokens, ...]`` zero-padded to ``length`` tokens."""
    missing = length - tensor.shape[1]
    return pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, missing]) if missing else tensor


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The rows of the latents; 1 where they are not found."""
    latents = args[0] if args else kwargs.get("hidden_states")
    return latents.shape[0] if isinstance(latents, torch.Tensor) and latents.ndim else 1


def _repeated(value: Any, rows: int) -> Any:
    """``value`` with an entry for each of the rows; None if it has not one for all."""
    if rows == 1:
        return None
    if isinstance(value, list):
        entries = [_repeated(entry, rows) for entry in value]  # pyright: ignore[reportUnknownVariableType]
        return entries if entries and all(entry is not None for entry in entries) else None
    if isinstance(value, torch.Tensor):
        return value.expand(rows, *value.shape[1:]) if value.ndim and value.shape[0] == 1 else None
    own = caches.fields(value)
    return (
        None if own is None else caches.made(type(value), {name: _in_cache(part, rows) for name, part in own.items()})
    )


def _in_cache(part: Any, rows: int) -> Any:
    """An attribute of a cache, whose lists have a tensor for each sample, or one for all."""
    several = isinstance(part, list) and len(part) > 1 and isinstance(part[0], torch.Tensor)  # pyright: ignore
    repeated = None if several else _repeated(part, rows)
    return part if repeated is None else repeated
