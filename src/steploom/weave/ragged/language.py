"""Denoiser calls of diffusion language models: rows at different blocks and lengths share a forward through padding.

A rule takes a call's arguments apart into tensors with the rows first, says which calls may meet, pads their arguments
to the longest, puts together what the module wants, and cuts each call's result back to its own length. Which pipelines
have which rule is declared in :mod:`steploom.weave.ragged.rules`; merges are verified like all others.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from steploom.weave.calls import Leaf, flatten, unflatten
from steploom.weave.ragged.text import Arguments

if TYPE_CHECKING:
    from steploom.weave.calls import ModuleCall

_MASKED_BY_TENSOR = ("sdpa", "eager")
"""Attention implementations that take a mask of four dimensions."""


class LanguageRule(Protocol):
    """How the calls of one pipeline's denoiser are merged. It gives tensors whose first axis is the rows."""

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments as tensors; None where they are not what the rule knows: then they are left as they are."""
        ...

    def key(self, call: ModuleCall) -> Hashable:
        """Equal for calls that may share a forward."""
        ...

    def lengths(self, call: ModuleCall) -> Hashable:
        """Equal for calls that share one without padding."""
        ...

    def padded(self, calls: Sequence[ModuleCall]) -> list[Arguments]:
        """The calls' arguments in one structure, each padded to the longest."""
        ...

    def put_together(self, first: ModuleCall, arguments: Arguments) -> Arguments:
        """What the module is given, from merged arguments."""
        ...

    def plain(self, result: Any) -> Any:
        """The module's result without what has no rows."""
        ...

    def returned(self, call: ModuleCall, result: Any, calls: Sequence[ModuleCall]) -> Any:
        """What ``call`` gets, from its rows of the merged ``result`` of ``calls``."""
        ...


@dataclasses.dataclass(frozen=True)
class RaggedSequence:
    """A model that reads the whole text in every call, which is as wide as the text is long so far.

    Attributes:
        alike: Keyword arguments that go with the ids (the first positional argument, ``[rows, width]``): each of their
            axes that is as long as the ids is padded on the right, masks with what hides.
        mask: The one of them that hides padding.
    """

    alike: tuple[str, ...] = ("attention_mask", "position_ids")
    mask: str = "attention_mask"

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments, each with a row for each row of ids."""
        ids = args[0] if len(args) == 1 else None
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if (
            not isinstance(ids, torch.Tensor)
            or ids.ndim != 2
            or self.mask not in tensors
            or tensors.keys() - self.alike
        ):
            return None
        if any(value.ndim < 2 or value.shape[-1] != ids.shape[1] for value in tensors.values()):
            return None
        if any(value.shape[0] not in (1, ids.shape[0]) for value in tensors.values()):
            return None
        return (ids,), {**kwargs, **{name: _rows(value, ids.shape[0]) for name, value in tensors.items()}}

    def key(self, call: ModuleCall) -> Hashable:
        """Whatever the widths."""
        return call.structure

    def lengths(self, call: ModuleCall) -> Hashable:
        """The width."""
        return _width(call)

    def padded(self, calls: Sequence[ModuleCall]) -> list[Arguments]:
        """Each argument padded to the widest call."""
        widest = max(map(_width, calls))
        return [self._pad(call, widest) for call in calls]

    def _pad(self, call: ModuleCall, widest: int) -> Arguments:
        (ids,), kwargs = call.plain
        width = ids.shape[1]
        changes: dict[str, Any] = {}
        for name in self.alike:
            value = kwargs.get(name)
            if isinstance(value, torch.Tensor):
                hides = torch.finfo(value.dtype).min if value.is_floating_point() and value.ndim > 2 else 0
                missing = [0, widest - width] * value.ndim
                sizes = reversed(value.shape[1:])
                for place, size in enumerate(sizes):
                    missing[2 * place + 1] *= size == width
                changes[name] = torch.nn.functional.pad(value, missing[: 2 * value.ndim - 2], value=hides)
        return (torch.nn.functional.pad(ids, (0, widest - width)),), {**kwargs, **changes}

    def put_together(self, first: ModuleCall, arguments: Arguments) -> Arguments:
        """As they are."""
        return arguments

    def plain(self, result: Any) -> Any:
        """Without the cache that nobody reads."""
        return _without_cache(result)

    def returned(self, call: ModuleCall, result: Any, calls: Sequence[ModuleCall]) -> Any:
        """The result without what belongs to padding."""
        width, widest = _width(call), max(map(_width, calls))
        return result if width == widest else _cut(result, widest, width)


@dataclasses.dataclass(frozen=True)
class RaggedCache:
    """A decoder that refines a canvas of fixed length and reads, without writing, a key-value cache of its own length.

    Caches and masks are padded on the left: the canvas follows the cache's last entry. What is only given from the
    second step on (the signal) is zero before, with a mask that says so.

    Attributes:
        ids: Keyword argument ``[rows, canvas]``.
        cache: Keyword argument with ``layers``, each with ``keys`` and ``values [rows, heads, length, channels]``.
        masks: Keyword argument: by kind of layer a mask ``[rows, 1, canvas, length + canvas]``, or None if all is seen.
        positions: Keyword argument ``[1 or rows, canvas]``.
        signal: Keyword argument ``[rows, canvas, vocabulary]``, or None.
        signal_mask: Keyword argument ``[rows]``.
    """

    ids: str = "decoder_input_ids"
    cache: str = "past_key_values"
    masks: str = "decoder_attention_mask"
    positions: str = "decoder_position_ids"
    signal: str = "self_conditioning_logits"
    signal_mask: str = "self_conditioning_mask"

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The cache as its tensors. A cache of fixed size keeps its place for the canvas elsewhere: left as it is."""
        ids, positions, layers = kwargs.get(self.ids), kwargs.get(self.positions), _layers(kwargs.get(self.cache))
        if args or not layers or not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
            return None
        if type(kwargs.get(self.masks)) is not dict or kwargs.get(self.signal_mask) is not None:
            return None
        rows = ids.shape[0]
        # in one order: with masks it is that of a set
        masks = {kind: None if m is None else _rows(m, rows) for kind, m in sorted(kwargs[self.masks].items())}
        tensors = tuple([(layer.keys, layer.values) for layer in layers])
        changes = {self.cache: tensors, self.masks: masks, self.positions: _rows(positions, rows)}
        return (), {**kwargs, **changes}

    def key(self, call: ModuleCall) -> Hashable:
        """Whatever the cache holds, where padding can be hidden."""
        _, kwargs = call.plain
        if not self._hides_padding(call):
            return (call.structure, self.lengths(call))
        ignored = (self.cache, self.masks, self.signal, self.signal_mask)
        others = {name: value for name, value in kwargs.items() if name not in ignored}
        shapes = tuple([(keys.shape[1], keys.shape[3], keys.dtype) for keys, _ in kwargs[self.cache]])
        return (flatten(others, []), kwargs[self.ids].shape[1], shapes, tuple(kwargs[self.masks]))

    @staticmethod
    def _hides_padding(call: ModuleCall) -> bool:
        config = getattr(getattr(call.target.module, "_orig_mod", call.target.module), "config", None)
        return getattr(config, "_attn_implementation", None) in _MASKED_BY_TENSOR

    def lengths(self, call: ModuleCall) -> Hashable:
        """The cache's, and which of the optional arguments there are."""
        _, kwargs = call.plain
        masks = tuple([mask is None for mask in kwargs[self.masks].values()])
        return (tuple([keys.shape[2] for keys, _ in kwargs[self.cache]]), masks, kwargs.get(self.signal) is None)

    def padded(self, calls: Sequence[ModuleCall]) -> list[Arguments]:
        """Caches and masks padded to the longest; arguments that some have not are made for them."""
        given = [call.plain[1] for call in calls]
        longest = [
            max(keys.shape[2] for keys, _ in layer) for layer in zip(*[k[self.cache] for k in given], strict=True)
        ]
        if len({self.lengths(call) for call in calls}) > 1:
            signal = next((k[self.signal] for k in given if k.get(self.signal) is not None), None)
            given = [self._complete(call, signal) for call in calls]
        return [((), self._pad(call, kwargs, longest)) for call, kwargs in zip(calls, given, strict=True)]

    def _complete(self, call: ModuleCall, signal: torch.Tensor | None) -> dict[str, Any]:
        """The arguments with all masks, and with a signal like ``signal``, which is another call's."""
        _, kwargs = call.plain
        ids = kwargs[self.ids]
        rows, canvas = ids.shape
        kinds = _lengths_by_kind(call.argument(self.cache), kwargs[self.masks])
        keys = kwargs[self.cache][0][0]
        impl = call.target.module.config._attn_implementation
        # added to the scores, or True where a key is seen
        seen = keys.new_zeros(()) if impl == "eager" else keys.new_ones((), dtype=torch.bool)
        masks = {
            kind: seen.repeat(rows, 1, canvas, kinds[kind] + canvas) if mask is None else mask
            for kind, mask in kwargs[self.masks].items()
        }
        changes: dict[str, Any] = {self.masks: masks}
        if signal is not None:
            own = kwargs.get(self.signal)
            known = own is not None
            changes[self.signal] = own if known else signal.new_zeros(rows, *signal.shape[1:])
            changes[self.signal_mask] = torch.full((rows,), known, dtype=torch.bool, device=ids.device)
        return {**kwargs, **changes}

    def _pad(self, call: ModuleCall, kwargs: dict[str, Any], longest: Sequence[int]) -> dict[str, Any]:
        layers = kwargs[self.cache]
        padded = tuple([(_left(k, -2, size, 0), _left(v, -2, size, 0))
                        for (k, v), size in zip(layers, longest, strict=True)])  # fmt: skip
        missing: dict[bool, int] = {}
        for layer, (keys, _), size in zip(_layers(call.argument(self.cache)), layers, longest, strict=True):
            missing[_slides(layer)] = size - keys.shape[2]
        masks: dict[str, Any] = {}
        for kind, mask in kwargs[self.masks].items():
            if mask is not None:
                hides = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
                mask = _left(mask, -1, mask.shape[-1] + missing.get("sliding" in kind, 0), hides)
            masks[kind] = mask
        return {**kwargs, self.cache: padded, self.masks: masks}

    def put_together(self, first: ModuleCall, arguments: Arguments) -> Arguments:
        """A cache like the first call's around the merged tensors."""
        args, kwargs = arguments
        cache = copy.copy(first.argument(self.cache))
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer, (keys, values) in zip(cache.layers, kwargs[self.cache], strict=True):
            layer.keys, layer.values = keys, values
        return args, {**kwargs, self.cache: cache}

    def plain(self, result: Any) -> Any:
        """Without the cache, which the module hands back as it was."""
        return _without_cache(result)

    def returned(self, call: ModuleCall, result: Any, calls: Sequence[ModuleCall]) -> Any:
        """The result with the call's own cache."""
        if hasattr(result, self.cache):
            setattr(result, self.cache, call.argument(self.cache))
        return result


def _width(call: ModuleCall) -> int:
    return call.plain[0][0].shape[1]


def _rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """``tensor`` with an entry for each row."""
    return tensor if tensor.shape[0] == rows else tensor.expand(rows, *tensor.shape[1:])


def _left(tensor: torch.Tensor, axis: int, size: int, value: float) -> torch.Tensor:
    """``tensor`` padded on the left of a (negative) axis to ``size``."""
    missing = size - tensor.shape[axis]
    return torch.nn.functional.pad(tensor, [0, 0] * (-axis - 1) + [missing, 0], value=value) if missing else tensor


def _layers(cache: Any) -> list[Any]:
    """The layers of a cache that grows with the text; empty for anything else."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or getattr(cache, "is_compileable", True):
        return []
    whole = all(getattr(getattr(layer, "keys", None), "ndim", 0) == 4 for layer in layers)  # pyright: ignore
    return layers if whole else []  # pyright: ignore[reportUnknownVariableType]


def _slides(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def _lengths_by_kind(cache: Any, kinds: Mapping[str, Any]) -> dict[str, int]:
    """How many entries the layers of each kind hold; a kind that no layer has holds none."""
    held = {_slides(layer): layer.keys.shape[2] for layer in _layers(cache)}
    return {kind: held.get("sliding" in kind, 0) for kind in kinds}


def _without_cache(result: Any) -> Any:
    """A result without its cache; a plain object as a namespace, which can be taken apart."""
    if isinstance(result, Mapping):
        kept = {name: value for name, value in result.items() if name != "past_key_values"}  # pyright: ignore
        return type(result)(**kept)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(result, (torch.Tensor, tuple, list)) or not hasattr(result, "__dict__"):
        return result  # pyright: ignore[reportUnknownVariableType]
    return SimpleNamespace(**{name: value for name, value in vars(result).items() if name != "past_key_values"})


def _cut(result: Any, padded: int, own: int) -> Any:
    """``result`` with the second axis of each tensor cut from ``padded`` to ``own`` entries."""

    def cut(leaf: Leaf) -> Leaf:
        if isinstance(leaf, list):
            return [tensor[:, :own] if tensor.ndim > 1 and tensor.shape[1] == padded else tensor for tensor in leaf]
        return leaf[:, :own] if leaf.ndim > 1 and leaf.shape[1] == padded else leaf

    leaves: list[Leaf] = []
    structure = flatten(result, leaves)
    return unflatten(structure, [cut(leaf) for leaf in leaves])
