"""LoRA per request: from the names that a request gives to adapters that are loaded, bounded and evicted when idle."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

from steploom import lora
from steploom.config import EngineConfig
from steploom.errors import InvalidRequest
from steploom.media.pictures import brief
from steploom.weave.lora import adapters
from steploom.weave.lora.adapters import Adapter, Chosen, Weaver
from steploom.weave.lora.selections import Selection, Selections
from steploom.weave.pipelines import Loom
from steploom.worker.lora.places import identity, place

_NONE = ("", None)
"""Of what is not loaded."""


@dataclasses.dataclass
class Counts:
    """What became of adapters since the start of the worker."""

    loads: int = 0
    evictions: int = 0


class Loras:
    """The adapters of one pipeline.

    Args:
        loom: Its shared modules.
        config: Names them (``loras``), and bounds how many stay loaded (``max_loras``).
        counts: Counts loading and dropping.
        tell: Hears of loading, which makes a tick longer than others.
    """

    def __init__(self, loom: Loom, config: EngineConfig, counts: Counts, tell: Callable[[str], None]) -> None:
        self._loom = loom
        self._named: Mapping[str, str] = config.loras or {}
        self._keep = config.max_loras
        self._local_files_only = config.local_files_only
        self._hub_timeout_s = config.hub_timeout_s
        self._tell = tell
        self._selections = Selections(Weaver(loom.shared))
        self._loaded: OrderedDict[Hashable, tuple[str, Adapter]] = OrderedDict()
        self._own: dict[str, Adapter] = {}
        self._number = 0
        self._counts = counts

    @property
    def names(self) -> list[str]:
        """The loaded adapters, least recently used first."""
        return [name for name, _ in self._loaded.values()]

    def take(self, wanted: Sequence[tuple[str, float]]) -> Selection:
        """The modules with the adapters that a request wants; they stay loaded until it is given back.

        Raises:
            InvalidRequest: One does not exist, does not fit, or they cannot be stacked.
        """
        why = adapters.refusal(self._loom.pipeline)
        if why is not None:
            raise InvalidRequest(f"lora={brief(wanted)}: {why}", field="lora")
        chosen: list[tuple[Adapter, float]] = []
        try:
            for name, scale in wanted:
                chosen.append((self._find(name, [own for own, _ in chosen]), scale))
            return self._select(chosen, wanted)
        finally:
            self._evict(self._keep, [])

    def _select(self, chosen: Chosen, wanted: Sequence[tuple[str, float]]) -> Selection:
        try:
            return self._selections.take(chosen)
        except InvalidRequest as fault:
            raise InvalidRequest(f"lora={brief(wanted)}: {fault}", field="lora") from None

    def give_back(self, selection: Selection) -> None:
        """A request does not need its adapters any more."""
        self._selections.give_back(selection)
        self._evict(self._keep, [])

    def forget_weights(self) -> None:
        """Drops what was made from the modules for nobody who is resident: the weights have changed."""
        self._selections.forget()

    def clear(self) -> None:
        """Drops everything; no request is resident."""
        self._selections.forget()
        self._loaded.clear()
        self._own.clear()

    def _find(self, name: str, pinned: Sequence[Adapter]) -> Adapter:
        """The adapter that a request calls ``name``, loaded if it is not."""
        own = adapters.own_names({c: one.origin for c, one in self._loom.shared.items()})
        if name in own and name not in self._named:
            return self._application_s(name)
        where = lora.find(name, self._named, own)
        key = self._unpinned(identity(where), pinned)
        if key not in self._loaded:
            self._evict(self._keep - 1, pinned)
            self._tell(f"loading LoRA {name}")
            self._number += 1
            try:
                found = place(where, self._hub_timeout_s, local_files_only=self._local_files_only)
                adapter = adapters.load(self._loom.pipeline, self._loom.shared, found, self._number)
            except InvalidRequest as fault:
                raise InvalidRequest(f"lora={brief(name)}: {where} {fault}", field="lora") from None
            self._loaded[key] = (name, adapter)
            self._counts.loads += 1
        self._loaded.move_to_end(key)
        return self._loaded[key][1]

    def _unpinned(self, identity: Hashable, pinned: Sequence[Adapter]) -> Hashable:
        """One of the copies of a file: whoever stacks it under several names has one for each, as in diffusers."""
        copies = ((identity, number) for number in itertools.count())
        return next(key for key in copies if not any(self._loaded.get(key, _NONE)[1] is own for own in pinned))

    def _application_s(self, name: str) -> Adapter:
        """An adapter that the application has loaded into its pipeline."""
        if name not in self._own:
            self._number += 1
            parts = {c: adapters.part_of(one.origin, name) for c, one in self._loom.shared.items()}
            self._own[name] = Adapter(self._number, {c: part for c, part in parts.items() if part.layers})
        return self._own[name]

    def _evict(self, keep: int, pinned: Sequence[Adapter]) -> None:
        """Drops adapters that nobody uses, least recently used first, until ``keep`` are left."""
        for key, (_, adapter) in list(self._loaded.items()):
            if len(self._loaded) <= keep:
                return
            if not self._selections.uses(adapter) and not any(adapter is own for own in pinned):
                self._selections.forget(adapter)
                del self._loaded[key]
                self._counts.evictions += 1
