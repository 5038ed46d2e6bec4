"""Axes: which dimension of which argument is the batch.

Learned, not tabulated: the same call is made with one and with two samples, and the shapes are compared. A dimension
that doubled is the batch axis, an argument that stayed the same is shared, a list that doubled has one entry per row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import torch

from steploom.weave.batching.row_lists import Path, doubled
from steploom.weave.calls import Leaf, ModuleCall, Structure, flatten, pattern
from steploom.weave.machine_faults import make_room
from steploom.weave.order import is_denoiser
from steploom.weave.program import Program

log = logging.getLogger(__name__)

SHARED = None
NOTHING_GREW = "no argument grows with the number of samples"
Axis = int | None
LeafAxis = int | Literal["rows"] | tuple[int | None, ...] | None
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Where the batch is, per leaf of a call's arguments and of its result.

    A tensor has an axis, or None if it is shared; a list of tensors has ``"rows"`` (one entry per row) or one axis per
    entry. ``outputs`` None: every output whose first dimension is a multiple of the rows has its batch there.
    ``pinned`` are leaves with a batch axis of which the module reads one row for all: they must be equal to be merged.
    ``listed`` are the lists of Python values that have more entries with more samples, by their place in the structure.
    ``reason`` says why calls of this pattern cannot be merged at all.
    """

    inputs: tuple[LeafAxis, ...] = ()
    outputs: tuple[LeafAxis, ...] | None = None
    pinned: frozenset[int] = frozenset()
    listed: frozenset[Path] = frozenset()
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """The shapes of one executed call, and the structure of its arguments."""

    inputs: tuple[Shapes, ...]
    outputs: tuple[Shapes, ...]
    structure: Structure = None


def seen(call: ModuleCall, result: object) -> Seen:
    """The shapes of ``call`` and of its ``result``."""
    outputs: list[Leaf] = []
    flatten(result, outputs)
    return Seen(tuple(map(_shapes, call.leaves)), tuple(map(_shapes, outputs)), call.structure)


def _shapes(leaf: Leaf) -> Shapes:
    return tuple(tuple(t.shape) for t in leaf) if isinstance(leaf, list) else (tuple(leaf.shape),)


def compare(one: Seen, two: Seen, leaves: Sequence[Leaf]) -> Axes:
    """Axes from the same call with one and with two samples."""
    if len(one.inputs) != len(two.inputs) or len(one.outputs) != len(two.outputs):
        return Axes(reason="the call changes its structure with the number of samples")
    try:
        pairs = zip(one.inputs, two.inputs, leaves, strict=True)
        inputs: tuple[LeafAxis, ...] = tuple([_leaf_axis(a, b, isinstance(leaf, list)) for a, b, leaf in pairs])
        results = zip(one.outputs, two.outputs, strict=True)
        outputs: tuple[LeafAxis, ...] = tuple([_leaf_axis(a, b, len(a) != 1 or len(b) != 1) for a, b in results])
    except ValueError as unclear:
        return Axes(reason=str(unclear))
    if not any(map(_grows, inputs)):
        return Axes(reason=NOTHING_GREW)
    return Axes(inputs, outputs, listed=doubled(one.structure, two.structure))


def _grows(axis: LeafAxis) -> bool:
    return any(own is not SHARED for own in axis) if isinstance(axis, tuple) else axis is not SHARED


def _leaf_axis(one: Shapes, two: Shapes, listed: bool) -> LeafAxis:
    if not listed:
        return _axis(one[0], two[0])
    if one and len(two) == 2 * len(one):
        return "rows"
    if len(two) != len(one):
        raise ValueError("a list changes its length with the number of samples")
    return tuple(_axis(a, b) for a, b in zip(one, two, strict=True))


def _axis(one: tuple[int, ...], two: tuple[int, ...]) -> Axis:
    if one == two:
        return SHARED
    changed = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) != len(two) or len(changed) != 1 or two[changed[0]] != 2 * one[changed[0]]:
        raise ValueError(f"an argument goes from {one} to {two} with twice the samples")
    return changed[0]


def guess(call: ModuleCall) -> tuple[LeafAxis, ...]:
    """Input axes where probing is impossible: the first dimension is a multiple of the rows of the first tensor.

    A multiple: text once per frame, pictures cut into patches.
    """
    exact = is_denoiser(call.target.name)
    first = next((leaf.shape[0] for leaf in call.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)

    def axis(tensor: torch.Tensor) -> Axis:
        if not first or not tensor.ndim:
            return SHARED
        if tensor.ndim < 3 and exact:  # scales by layer, indices of frames
            return 0 if tensor.shape[0] == first else SHARED
        return 0 if tensor.shape[0] % first == 0 else SHARED

    return tuple(tuple(map(axis, leaf)) if isinstance(leaf, list) else axis(leaf) for leaf in call.leaves)


def spread(call: ModuleCall) -> frozenset[int]:
    """The tensors of one row that the module spreads over the several rows of its first one, by their place.

    A request for two images may bring embeddings of one row (Flux, Wan): in its calls these are shared, in others not.
    """
    if not is_denoiser(call.target.name):
        return frozenset()
    rows = [
        (i, leaf.shape[0]) for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor) and leaf.ndim > 1
    ]
    return frozenset(i for i, own in rows if own == 1 < rows[0][1])


class AxisBook:
    """What is known about axes, by module class, method, call pattern, and what is spread over the rows."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Axes] = {}

    @staticmethod
    def entry(call: ModuleCall) -> Hashable:
        """Equal for like calls with any number of samples. Not the module object: Wan 2.2's two behave alike."""
        return (type(call.target.module), call.target.method, pattern(call.structure))

    def find(self, call: ModuleCall) -> Axes | None:
        """Axes for ``call``, if they are known."""
        return self._known.get((self.entry(call), spread(call)))

    def put(self, call: ModuleCall, axes: Axes) -> Axes:
        """Files ``axes`` for all calls like ``call``."""
        self._known[self.entry(call), spread(call)] = axes
        return axes

    def probe(self, call: ModuleCall, result: object, doubled: Iterable[Program]) -> Axes:
        """Learns from ``call``, which gave ``result``, and the first like call of a program with twice the samples.

        ``doubled`` are ways of asking for twice the samples; the one in which most arguments grow counts (Kandinsky 5
        doubles its latents and forgets the text). Where none tells, axes are guessed: every kind of merge is checked.
        """
        one = seen(call, result)
        best, most, listed = Axes(guess(call)), 0, frozenset[Path]()
        for program in doubled:
            two = self._run_until(call, program)
            found = Axes(reason=NOTHING_GREW) if two is None else compare(one, two, call.leaves)
            listed |= found.listed  # Qwen-Image has a size for each prompt, but not for each picture
            grown = sum(map(_grows, found.inputs))
            if found.reason is None and grown > most:
                best, most = found, grown
        return self.put(call, dataclasses.replace(best, listed=listed))

    def _run_until(self, wanted: ModuleCall, program: Program) -> Seen | None:
        """Runs ``program``'s first step, calls executed alone, until it makes a call like ``wanted``."""
        entry = self.entry(wanted)
        try:
            program.resume()
            while program.call is not None:
                call = program.call
                result = call.run()
                if self.entry(call) == entry:
                    return seen(call, result)
                program.resume(result)
            if program.error is not None:
                log.info("probing the axes of %s failed in the pipeline: %s", wanted.target.name, program.error)
        except Exception as fault:  # noqa: BLE001 - the module's failure: the axes are guessed, and verified
            log.info("probing the axes of %s failed in the module: %s", wanted.target.name, fault)
            make_room(fault)  # whoever keeps what is logged keeps the fault
        finally:
            program.unwind()
        return None
