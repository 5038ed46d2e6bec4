"""Answers identical text-encoder calls (the empty negative prompt above all) from a byte-bounded LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from steploom.weave.batching.merge_keys import digest
from steploom.weave.calls import Leaf, ModuleCall, Structure, flatten, has_opaque, unflatten
from steploom.weave.modules.fingerprint import fingerprint
from steploom.weave.modules.structure import ModuleStructure

_MODULES = 8
"""Of so many it remembers what they were, and need not look at all of their parts for every request."""


class EncodeCache:
    """Results of text-encoder calls by content of their arguments.

    Args:
        limit_bytes: Bytes of results that are kept; with 0 every call is run.

    Attributes:
        bytes: Of the results that are kept now.
        hits: Calls answered without the module.
        misses: Calls that could have been, and were not.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Structure, list[torch.Tensor]]] = OrderedDict()
        self._fingerprints: dict[int, Hashable] = {}
        self._structures: OrderedDict[int, ModuleStructure] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def look_again(self) -> None:
        """A tick begins: looks at modules again, which it does once until this is called."""
        self._fingerprints.clear()

    def forget_modules(self) -> None:
        """Lets go of the modules that it has seen; what they answered is kept."""
        self._fingerprints.clear()
        self._structures.clear()

    def key(self, call: ModuleCall) -> Hashable | None:
        """What identical calls share; None where the call cannot be cached."""
        # Also the nested pipelines' of a cascade (prior_pipe.text_encoder) and its prior's own (prior_text_encoder).
        if "text_encoder" not in call.target.name or has_opaque(call.structure) or self._limit == 0:
            return None
        if getattr(call.target.module, "_hf_peft_config_loaded", False):
            return None  # the application's own adapters can be switched without the module knowing
        if any(isinstance(leaf, list) for leaf in call.leaves):
            return None
        adapted = call.target.adapted
        return (
            call.target.key,
            None if adapted is None else adapted.key,
            self._fingerprint(getattr(call.target.module, "_orig_mod", call.target.module)),
            call.structure,
            tuple(digest(leaf) for leaf in call.leaves if isinstance(leaf, torch.Tensor)),
        )

    def _fingerprint(self, module: Any) -> Hashable:
        known = self._fingerprints.get(id(module))
        if known is None:
            known = self._fingerprints[id(module)] = fingerprint(module, self._structure(module))
        return known

    def _structure(self, module: Any) -> ModuleStructure:
        if id(module) not in self._structures:  # which keep their modules: an address is one module's
            self._structures[id(module)] = ModuleStructure(module)
            if len(self._structures) > _MODULES:
                self._structures.popitem(last=False)
        return self._structures[id(module)]

    def get(self, key: Hashable) -> Any:
        """A copy of the kept result (the caller may update it in place); None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        structure, leaves = entry
        return unflatten(structure, [leaf.clone() for leaf in leaves])

    def repeat(self, result: Any) -> Any:
        """A copy of the result of an identical call of the same tick; None if it is not plain tensors."""
        leaves: list[Leaf] = []
        structure = flatten(result, leaves)
        if has_opaque(structure) or any(isinstance(leaf, list) for leaf in leaves):
            self.misses += 1
            return None
        self.hits += 1
        return unflatten(structure, [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)])

    def put(self, key: Hashable, result: Any) -> None:
        """Keeps a copy of ``result`` if it is plain tensors and fits."""
        leaves: list[Leaf] = []
        structure = flatten(result, leaves)
        if has_opaque(structure) or key in self._entries or any(isinstance(leaf, list) for leaf in leaves):
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        if not 0 < size <= self._limit:
            return
        while self.bytes + size > self._limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in dropped)
        self._entries[key] = (structure, [tensor.clone() for tensor in tensors])
        self.bytes += size

    def clear(self) -> None:
        """Drops everything (the weights changed)."""
        self.forget_modules()
        self._entries.clear()
        self.bytes = 0
