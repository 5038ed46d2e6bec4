"""Calls of one denoiser by different pipelines of a family, made alike: they differ in form and mean the same.

Declarative, by the denoiser's class: whose results are wrapped or not as the pipeline likes, and which arguments are
*added* to hidden states, so that a call without them is a call with zeros. A ControlNet's residuals are: requests with
and without a ControlNet share forwards. Merges are verified like all others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from steploom.weave.axes import Axes, LeafAxis
from steploom.weave.batching.merge_keys import leaf_identity
from steploom.weave.calls import Leaf, ModuleCall, flatten, unflatten

WRAPPED = frozenset({"Kandinsky3UNet", "ZImageTransformer2DModel"})
"""Classes that some pipelines ask for tuples (``return_dict=False``) and some for outputs; a tuple is the output's."""

ADDED = {
    "FluxTransformer2DModel": (
        "controlnet_block_samples", "controlnet_single_block_samples", "controlnet_blocks_repeat",
    ),
    "SD3Transformer2DModel": ("block_controlnet_hidden_states",),
    "UNet2DConditionModel": ("down_block_additional_residuals", "mid_block_additional_residual"),
}  # fmt: skip
"""Arguments whose tensors, rows first, are added to hidden states, and settings that concern nothing else."""


def wrapped_as_asked(module: object) -> bool:
    """Whether calls of ``module`` may be made without ``return_dict``, and their results unwrapped afterwards."""
    return type(module).__name__ in WRAPPED


def common_key(call: ModuleCall, axes: Axes) -> tuple[ModuleCall, Axes]:
    """``call`` as one with additions and one without have it in common; itself where nothing is ever added."""
    added = _added(call)
    if not added:
        return call, axes
    args, kwargs = call.arguments
    kept = {name: kwargs[name] for name in sorted(kwargs) if name not in added and kwargs[name] is not None}
    bare = ModuleCall(call.target, args, kept)
    pairs = zip(call.leaves, axes.inputs, strict=True)
    known: dict[Hashable, LeafAxis] = {_identity(leaf): axis for leaf, axis in pairs}
    return bare, Axes(tuple(known[_identity(leaf)] for leaf in bare.leaves))


def completed(call: ModuleCall, mates: Sequence[ModuleCall]) -> tuple[ModuleCall, ModuleCall] | None:
    """``call`` with zeros for what the first fitting one of its mates has added, and that mate; None without any."""
    added = _added(call)
    if not added or any(call.argument(name) is not None for name in added):
        return None
    for mate in mates:
        if mate.target.key == call.target.key and any(mate.argument(name) is not None for name in added):
            other = _like(call, mate, added)
            if other is not None:
                return other, mate
    return None


def _added(call: ModuleCall) -> tuple[str, ...]:
    if call.target.method != "forward":
        return ()
    return ADDED.get(type(getattr(call.target.module, "_orig_mod", call.target.module)).__name__, ())


def _like(call: ModuleCall, mate: ModuleCall, added: tuple[str, ...]) -> ModuleCall | None:
    """``call`` in the form of ``mate``; None if they differ in more than additions."""
    (args, kwargs), (_, theirs) = call.arguments, mate.arguments
    own, other = _sample(call), _sample(mate)
    if own is None or other is None or own.shape[1:] != other.shape[1:] or not other.shape[0]:
        return None
    if any(name not in theirs and value is not None for name, value in kwargs.items()):
        return None
    form: dict[str, Any] = {}
    for name, value in theirs.items():
        form[name] = _zeros(value, own.shape[0], other.shape[0]) if name in added else kwargs.get(name)
    made = ModuleCall(call.target, args, form)
    return made if made.structure == mate.structure else None


def _sample(call: ModuleCall) -> torch.Tensor | None:
    """The latents: their rows are those of what is added."""
    value = call.place(0)
    value = call.argument("hidden_states") if value is None else value
    return value if isinstance(value, torch.Tensor) and value.ndim else None


def _zeros(value: Any, rows: int, theirs: int) -> Any:
    """Zeros like ``value``, for other rows."""
    leaves: list[Leaf] = []
    structure = flatten(value, leaves)
    return unflatten(
        structure,
        [
            [_zero(entry, rows, theirs) for entry in leaf] if isinstance(leaf, list) else _zero(leaf, rows, theirs)
            for leaf in leaves
        ],
    )


def _zero(tensor: torch.Tensor, rows: int, theirs: int) -> torch.Tensor:
    return tensor.new_zeros((tensor.shape[0] * rows // theirs, *tensor.shape[1:]))


def _identity(leaf: Leaf) -> Hashable:
    return (isinstance(leaf, list), leaf_identity(leaf))
