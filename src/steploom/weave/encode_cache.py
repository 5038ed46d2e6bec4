"""Answers identical text-encoder calls (the empty negative prompt above all) from a byte-bounded LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from steploom.weave.calls import Leaf, ModuleCall, Structure, flatten, has_opaque, unflatten
from steploom.weave.merging import digest
from steploom.weave.shared import version


class EncodeCache:
    """Results of text-encoder calls by content of their arguments.

    Args:
        limit_bytes: Bytes of results that are kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Structure, list[torch.Tensor]]] = OrderedDict()
        self.hits = 0

    def key(self, call: ModuleCall) -> Hashable | None:
        """What identical calls share; None where the call cannot be cached."""
        if not call.target.name.startswith("text_encoder") or has_opaque(call.structure):
            return None
        if getattr(call.target.module, "_hf_peft_config_loaded", False):
            return None  # the application's own adapters can be switched without the module knowing
        if any(isinstance(leaf, list) for leaf in call.leaves):
            return None
        adapted = call.target.adapted
        return (
            call.target.key,
            None if adapted is None else adapted.key,
            version(getattr(call.target.module, "_orig_mod", call.target.module)),
            call.structure,
            tuple(digest(leaf) for leaf in call.leaves if isinstance(leaf, torch.Tensor)),
        )

    def get(self, key: Hashable) -> Any:
        """A copy of the kept result (the caller may update it in place); None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        structure, leaves = entry
        return unflatten(structure, [leaf.clone() for leaf in leaves])

    def put(self, key: Hashable, result: Any) -> None:
        """Keeps a copy of ``result`` if it is plain tensors and fits."""
        leaves: list[Leaf] = []
        structure = flatten(result, leaves)
        if has_opaque(structure) or key in self._entries or any(isinstance(leaf, list) for leaf in leaves):
            return
        kept = [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        size = _size(kept)
        if size > self._limit:
            return
        self._entries[key] = (structure, kept)
        self._bytes += size
        while self._bytes > self._limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._bytes -= _size(dropped)

    def clear(self) -> None:
        """Drops everything (the weights changed)."""
        self._entries.clear()
        self._bytes = 0


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
