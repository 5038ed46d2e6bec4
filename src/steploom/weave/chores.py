"""Chores: calls of text encoders, VAEs and the like, which no step of a loop waits for."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from steploom.weave.batching.batches import Batches, Group
from steploom.weave.batching.invariant import InvariantBatches
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import ModuleCall
from steploom.weave.counters import Counters
from steploom.weave.forwards.encode_cache import EncodeCache
from steploom.weave.program import Program


class Chores:
    """Answers calls of encoders and decoders: merged where they can be, identical text-encoder calls run once.

    What is learned of such calls is its own, so that it may be used on another thread than the denoisers' calls; by one
    at a time.

    Args:
        cache: Of text-encoder results.
        tell: Hears of verification; on the thread that answers.
        merging: Whether calls share forwards.

    Attributes:
        batches: What is known about merging them.
        counters: What was done since these were absorbed last.
    """

    def __init__(self, cache: EncodeCache, tell: Callable[[str], None], *, merging: bool = True) -> None:
        self.counters = Counters()
        self.batches = (
            Batches(self.counters, tell, Wholes()) if merging else InvariantBatches(self.counters, tell, Wholes(), 1)
        )
        self._cache = cache

    def answer(self, group: Group) -> None:
        """Answers every call of the group, each with a result or with its own fault."""
        firsts: dict[Hashable, Program] = {}
        fresh: Group = []
        repeats: list[tuple[Hashable, Program, ModuleCall]] = []
        for program, call in group:
            key = self._cache.key(call)
            if key in firsts:
                repeats.append((key, program, call))
                continue
            program.answer = None if key is None else self._cache.get(key)
            if program.answer is None:
                fresh.append((program, call))
                if key is not None:
                    firsts[key] = program
        if fresh:
            self.batches.run(fresh)
        for key, program in firsts.items():
            if program.fault is None:
                self._cache.put(key, program.answer)
        for key, program, call in repeats:
            first = firsts[key]
            program.answer = None if first.fault is not None else self._cache.repeat(first.answer)
            if program.answer is None:  # not plain tensors, or failed
                self.batches.run_members([(program, call)])
