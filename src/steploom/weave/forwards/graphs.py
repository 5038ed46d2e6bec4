"""CUDA graphs: forwards that come again are recorded once and replayed, without the host's part in them.

A graph replays what was recorded, on the memory that it was recorded on. So the arguments of each forward are copied
into *static* buffers, and its results are copied out of them before the next replay. There is one graph for each kind
of call: module, structure with all its Python scalars, and shapes. So that there are few shapes, merged calls are
padded to 1, 2, 4, 8, 16... calls of each row count by repetition of one of them, whose result is dropped: whole calls,
so that processors that cut the batch by branches find them where they were.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import Leaf, ModuleCall, Structure, flatten, has_opaque, unflatten
from steploom.weave.forwards.running import Forwards
from steploom.weave.modules.shared import Target

log = logging.getLogger(__name__)

_SEEN_KEPT = 1024
_REFUSALS_KEPT = 1024


class Recording(Protocol):
    """A forward that can be replayed on the buffers that it was recorded on.

    Attributes:
        nbytes: Device memory that it holds beside these buffers, where known.
    """

    nbytes: int

    def replay(self) -> None:
        """Computes its results anew, in place, from what the buffers hold now."""
        ...

    def release(self) -> None:
        """It will not be replayed any more."""
        ...


class Recorder(Protocol):
    """Records forwards; the seam between what is CUDA's and what is not."""

    device: torch.device

    def record(self, run: Callable[[], Any]) -> tuple[Recording, Any]:
        """Runs ``run`` often enough to settle it, then once more to record it; the recording, and its result."""
        ...


@dataclasses.dataclass
class Graph:
    """One recorded forward.

    Attributes:
        inputs: Its static arguments.
        structure: Of the result, around ``outputs``.
        outputs: Its static results.
        recording: What replays.
        nbytes: Device memory that it holds.
    """

    inputs: list[Leaf]
    structure: Structure
    outputs: list[Leaf]
    recording: Recording
    nbytes: int

    def replay(self, leaves: Sequence[Leaf]) -> Any:
        """The result for these arguments, in memory of its own."""
        for static, given in zip(_tensors(self.inputs), _tensors(leaves), strict=True):
            static.copy_(given)
        self.recording.replay()
        return unflatten(self.structure, _copies(self.outputs))


class Graphs:
    """The graphs of a worker, at most so many and so large; the least recently used makes room.

    Args:
        recorder: Records.
        limit: Graphs held at most.
        limit_bytes: Bytes of device memory that they hold at most.
        tell: Hears of recording, which makes a tick longer than others.

    Attributes:
        refused: Whether the last forward could not be replayed and never will be.
        active: Whether forwards may be replayed now: not those whose bits are being compared.
        captures: Graphs recorded so far.
        replays: Forwards answered by one.
        evictions: Graphs dropped to make room.
        nbytes: What the graphs hold now.
        seconds: Spent on recording.
    """

    def __init__(
        self, recorder: Recorder, limit: int, limit_bytes: int, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self.active = self.refused = False
        self.captures = self.replays = self.evictions = self.nbytes = 0
        self.seconds = 0.0
        self._recorder = recorder
        self._limit, self._limit_bytes = limit, limit_bytes
        self._tell = tell
        self._made: OrderedDict[Hashable, Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: OrderedDict[Hashable, None] = OrderedDict()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._made)

    def counts(self) -> dict[str, int]:
        """What is held now, and what was done so far."""
        return {
            "held": len(self._made),
            "bytes": self.nbytes,
            "captures": self.captures,
            "replays": self.replays,
            "evictions": self.evictions,
        }

    def around(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, a module that is called ``name``, replayed where it can be."""
        number = next(self._numbers)

        def replayed(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return run(*args, **kwargs)
            leaves: list[Leaf] = []
            structure = flatten((args, kwargs), leaves)
            self.refused = False
            key = (number, structure, tuple([_shapes(leaf) for leaf in leaves]))
            graph = self._made.get(key)
            if graph is not None:
                self._made.move_to_end(key)
            elif not self._worthwhile(key, leaves) or (graph := self._record(name, key, run, leaves)) is None:
                return run(*args, **kwargs)
            self.replays += 1
            return graph.replay(leaves)

        return replayed

    def clear(self) -> None:
        """Drops all graphs: the weights are moving elsewhere."""
        while self._made:
            self._drop()
        self._seen.clear()
        self._refused.clear()

    def _worthwhile(self, key: Hashable, leaves: Sequence[Leaf]) -> bool:
        """Whether to record: at the second time, where nothing on the host would be frozen into the graph."""
        _, structure, _ = key  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
        on_host = any(tensor.device != self._recorder.device for tensor in _tensors(leaves))
        if on_host or key in self._refused or has_opaque(structure):
            self.refused = True
            return False
        if key in self._seen:
            return True
        _remember(self._seen, key, _SEEN_KEPT)
        return False

    def _record(self, name: str, key: Any, run: Callable[..., Any], leaves: Sequence[Leaf]) -> Graph | None:
        """Records a forward; None, for good, if it cannot be."""
        started = time.perf_counter()
        self._tell(f"capturing a CUDA graph of {name}")
        inputs = _copies(leaves)

        def once() -> Any:
            args, kwargs = unflatten(key[1], [list(x) if isinstance(x, list) else x for x in inputs])
            return run(*args, **kwargs)

        try:
            recording, result = self._recorder.record(once)
        except Exception as fault:  # noqa: BLE001 - whatever a module raises that synchronises: then it runs as it is
            words = " ".join(str(fault).split())[:300]
            self._refuse(name, key, f"{type(fault).__name__}: {words}")
            return None
        finally:
            self.seconds += time.perf_counter() - started
        return self._keep(name, key, inputs, recording, result)

    def _keep(self, name: str, key: Hashable, inputs: list[Leaf], recording: Recording, result: Any) -> Graph | None:
        outputs: list[Leaf] = []
        structure = flatten(result, outputs)
        nbytes = recording.nbytes + sum(t.nbytes for t in (*_tensors(inputs), *_tensors(outputs)))
        if has_opaque(structure) or nbytes > self._limit_bytes:
            why = "its result is no tensors" if has_opaque(structure) else f"it needs {nbytes} bytes"
            recording.release()
            self._refuse(name, key, why)
            return None
        graph = self._made[key] = Graph(inputs, structure, outputs, recording, nbytes)
        self.captures += 1
        self.nbytes += nbytes
        while len(self._made) > self._limit or self.nbytes > self._limit_bytes:
            self._drop()
            self.evictions += 1
        return graph

    def _refuse(self, name: str, key: Hashable, why: str) -> None:
        log.warning("%s runs without a CUDA graph: %s", name, why)
        self.refused = True
        _remember(self._refused, key, _REFUSALS_KEPT)

    def _drop(self) -> None:
        """Drops the least recently used; it is recorded anew when it has come twice again."""
        key, graph = self._made.popitem(last=False)
        self._seen.pop(key, None)
        self.nbytes -= graph.nbytes
        graph.recording.release()


class Replayed(Forwards):
    """Forwards by graphs, for calls alone and for merged calls of a verified kind.

    Args:
        graphs: The graphs.
        targets: What they are of.
        prepared: Seconds since the start that went into compiling and capturing.
    """

    def __init__(self, graphs: Graphs, targets: frozenset[Target], prepared: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__(prepared)
        self._graphs = graphs
        self._targets = targets
        self._plain: set[Hashable] = set()

    def merged(self, merged: MergedCall, *, known: bool) -> list[Any]:
        """Pads the call to a size that comes again, if its kind is verified."""
        if not known or not self._worth_padding(merged):
            return super().merged(merged, known=known)
        self._before = self._prepared()
        whole = padded(merged)
        self._graphs.active = True
        try:
            results = whole.run()
        finally:
            self._graphs.active = False
            merged.forward_s = whole.forward_s
            if self._graphs.refused:
                self._plain.add(merged.kind)
        own = dict(zip(whole.order, results, strict=True))
        return [own[i] for i in range(len(merged.calls))]

    def alone(self, call: ModuleCall) -> Any:
        """Runs the call on its own graph."""
        self._graphs.active = call.target in self._targets
        try:
            return super().alone(call)
        finally:
            self._graphs.active = False

    def _worth_padding(self, merged: MergedCall) -> bool:
        """Whether padded rows may be replayed: a language model's cache, and what cannot be recorded, may not."""
        if merged.blended or merged.calls[0].language is not None:
            return False
        return merged.target in self._targets and merged.kind not in self._plain


def padded(merged: MergedCall) -> MergedCall:
    """The call with as many calls of each row count as the next power of 2 says: its last one is repeated."""
    extra: list[int] = []
    for rows in dict.fromkeys(merged.rows):
        own = [i for i, other in enumerate(merged.rows) if other == rows]
        extra += own[-1:] * (bucket(len(own)) - len(own))
    places = [*range(len(merged.calls)), *extra]
    calls, each = [merged.calls[i] for i in places], [merged.each[i] for i in places]
    return MergedCall(calls, merged.axes, each, branches=merged.layout.by_branch)


def bucket(count: int) -> int:
    """The least power of 2 that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _shapes(leaf: Leaf) -> Hashable:
    return tuple([tensor.shape for tensor in leaf]) if isinstance(leaf, list) else leaf.shape


def _tensors(leaves: Sequence[Leaf]) -> list[torch.Tensor]:
    return [tensor for leaf in leaves for tensor in (leaf if isinstance(leaf, list) else [leaf])]


def _copies(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Copies of their own, without the strides of an expanded view: two rows in one place cannot be written."""
    return [
        [tensor.clone(memory_format=torch.contiguous_format) for tensor in leaf]
        if isinstance(leaf, list)
        else leaf.clone(memory_format=torch.contiguous_format)
        for leaf in leaves
    ]


def _remember(kept: OrderedDict[Hashable, None], key: Hashable, limit: int) -> None:
    kept[key] = None
    while len(kept) > limit:
        kept.popitem(last=False)
