"""Holdings: the bytes of what a program keeps between steps, as far as its denoiser calls show it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steploom.weave.calls import Leaf


class Holdings:
    """The tensors of a program's denoiser calls of one step: latents, embeddings, masks.

    A tensor that several calls of the step have counts once, and a view counts as much of its storage as it shows: the
    rest belongs to the requests that it was computed with.

    Attributes:
        nbytes: What they weigh together.
        step: Steps that the program had done when they were looked at.
    """

    __slots__ = ("_seen", "_storages", "nbytes", "step")

    def __init__(self) -> None:
        self.nbytes = 0
        self.step = 0
        self._seen: set[tuple[int, torch.Size]] = set()
        self._storages: dict[int, int] = {}

    def add(self, leaves: Sequence[Leaf], step: int) -> None:
        """A call of this step has these tensors. Those of an earlier step are forgotten."""
        if step != self.step:
            self.step, self._seen, self._storages = step, set(), {}
        for leaf in leaves:
            for tensor in leaf if isinstance(leaf, list) else (leaf,):
                self._add_tensor(tensor)
        self.nbytes = sum(self._storages.values())

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        shown = tensor.numel() * tensor.element_size()
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:  # it may have no storage
            self._storages[id(tensor)] = shown
            return
        storage, view = tensor.untyped_storage(), (tensor.data_ptr(), tensor.shape)
        if view not in self._seen:
            self._seen.add(view)
            place = storage.data_ptr()
            self._storages[place] = min(storage.nbytes(), self._storages.get(place, 0) + shown)
