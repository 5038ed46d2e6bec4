"""What makes the same forwards faster in a worker: compiled code and CUDA graphs around its denoisers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypedDict

import torch

from steploom.config import EngineConfig
from steploom.config.parallel import asked
from steploom.weave.forwards.cuda_graphs import CudaRecorder
from steploom.weave.forwards.graphs import Graphs, Replayed
from steploom.weave.forwards.running import Forwards
from steploom.weave.hub import Hub
from steploom.weave.modules.compiled import Compilation, is_compiled
from steploom.weave.modules.shared import SharedModule, Target
from steploom.weave.order import is_denoiser
from steploom.weave.pipelines import Loom
from steploom.worker.ranks import parallel
from steploom.worker.ranks.spmd import Rank, required


class Counts(TypedDict):
    """What :class:`~steploom.protocol.WorkerStats` says of it."""

    compilations: int
    compile_s: float
    uncompiled: str | None
    graphs: dict[str, int]


class Tuning:
    """Puts compilation's rules, and graphs, around the denoisers of a loom.

    Args:
        config: The engine's settings.
        given: Whether the pipeline is the application's: what it has compiled is counted, and left as it is.
        tell: Hears of what makes a tick longer than others.
    """

    def __init__(self, config: EngineConfig, tell: Callable[[str], None], *, given: bool) -> None:
        self._config = config
        self._given = given
        self._tell = tell
        self._compilation = Compilation(tell, None if given else config.max_compilations)
        self._graphs: Graphs | None = None
        self._places: Hashable = None

    def weave(self, loom: Loom, hub: Hub) -> None:
        """Takes up the denoisers of ``loom``, whose calls ``hub`` runs."""
        found = {name: one for name, one in loom.shared.items() if is_denoiser(name) and "forward" in one.targets}
        for shared in found.values():
            if is_compiled(shared.base):
                shared.targets["forward"].wrap(self._compilation.around)
        self.forget()
        device = torch.device(loom.device)
        if not self._config.cuda_graphs or device.type != "cuda":
            hub.batches.forwards = Forwards(lambda: self._compilation.seconds)
            if self._config.ranks > 1:
                keep_together(hub, found, required(asked(self._config)))
            return
        if self._graphs is None:
            self._graphs = Graphs(
                CudaRecorder(device), self._config.max_cuda_graphs, self._config.cuda_graph_bytes, self._tell
            )
        targets: set[Target] = set()
        for shared in found.values():
            shared.targets["forward"].wrap(self._graphs.around)
            targets.add(shared.targets["forward"])
        hub.batches.forwards = Replayed(self._graphs, frozenset(targets), self._seconds)

    def look(self, loom: Loom) -> None:
        """Drops graphs if the application has moved weights since: they would replay on what was there."""
        if not self._given or self._graphs is None:
            return
        places = _places([one.origin for name, one in loom.shared.items() if is_denoiser(name)])
        if places != self._places:
            self.forget()
            self._places = places

    def forget(self) -> None:
        """Drops the graphs: the weights have changed their place, or may have."""
        if self._graphs is not None:
            self._graphs.clear()

    def counts(self) -> Counts:
        """What was done so far."""
        return Counts(
            compilations=self._compilation.count,
            compile_s=self._compilation.seconds,
            uncompiled=self._compilation.uncompiled,
            graphs={} if self._graphs is None else self._graphs.counts(),
        )

    def _seconds(self) -> float:
        """What went into compiling and recording; recording compiles, so the greater part may hold the other."""
        recording = 0.0 if self._graphs is None else self._graphs.seconds
        return recording + self._compilation.seconds


def keep_together(hub: Hub, found: Mapping[str, SharedModule], rank: Rank) -> None:
    """What each rank would find out for itself, rank 0 does for all; what one's forward raises, all have to."""
    for batches in (hub.batches, hub.chores.batches):
        batches.settle, batches.forwards.failed = rank.settle, rank.fault
    for shared in found.values():
        shared.targets["forward"].wrap(lambda _, run, model=shared.origin: parallel.around(model, run))


def _places(modules: list[Any]) -> Hashable:
    return hash(tuple(parameter.data_ptr() for module in modules for parameter in module.parameters()))
