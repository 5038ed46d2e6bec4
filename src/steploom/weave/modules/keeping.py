"""What the application's methods of a pipeline keep where all requests would have it in common.

A request has a pipeline and a noise scheduler of its own, and so their attributes. A dict or a helper object that is
one of these, a list in a closure, a global variable are everybody's: ``self.state["prompt"] = ...`` in one request is
read by another, which has its turn in between. That is looked for as in denoisers
(:mod:`steploom.weave.modules.remembering`), but only what is surely written and read counts, and no table that is
filled by keys: such a cache is meant to be shared.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from steploom.weave.modules.findings import Findings, Key, Memory
from steploom.weave.modules.locks import methods_of
from steploom.weave.modules.remembering import read


class _Lenient(Findings):
    """Takes no note of what is the request's own, nor of what goes out of sight.

    Args:
        own: Kinds of keys of which each request has its own.
    """

    def __init__(self, own: tuple[str, ...]) -> None:
        super().__init__()
        self._own = own
        self._tables = set[Key]()

    def reads(self, key: Key) -> None:
        """See :class:`Findings`."""
        if key[0] not in self._own:
            super().reads(key)

    def writes(self, key: Key, by: FunctionType, name: str, *, own: bool) -> None:
        """See :class:`Findings`."""
        if key[0] not in self._own and key not in self._tables:
            super().writes(key, by, name, own=False)

    def keyed(self, key: Key) -> None:
        """See :class:`Findings`."""
        self._tables.add(key)
        self.forget(key)

    def loses(self, by: FunctionType, name: str) -> None:
        """See :class:`Findings`."""


def keeps(pipeline: Any, noise_scheduler: Any) -> Memory | None:
    """What the application's methods of a pipeline and its noise scheduler keep in common; None if nothing is known."""
    for holder, own in ((pipeline, ("attribute",)), (noise_scheduler, ("attribute", "content"))):  # of this a deep copy
        findings = _Lenient(own)
        for function in methods_of(holder):
            read(findings, function, holder, is_hook=False)
        if (found := findings.verdict()) is not None:
            return found
    return None
