"""Tokenizers for programs: padding and truncation are settings of the object, which every call changes as it runs."""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import Any, NamedTuple, cast

from steploom.errors import raised
from steploom.weave import untyped
from steploom.weave.modules.rebinding import functions_of, unsettled

log = logging.getLogger(__name__)

_KEPT = 16
"""Copies that are kept: more if the application gives the pipeline others again and again."""

_PLAIN, _HOLDERS = (str, int, float), (dict, list, tuple)
_LARGE = 1000
"""Entries of a vocabulary, which are counted with the tokens."""
_STAGES = ("normalizer", "pre_tokenizer", "post_processor")
"""Of a fast tokenizer's backend, what is small: its state is written out anew with every look."""


class _Copy(NamedTuple):
    """``given`` must live as long as its id counts."""

    given: Any
    was: dict[str, Any]
    own: Any


class Tokenizers:
    """Copies of an application's tokenizers, which it may call meanwhile; made anew when it has changed one."""

    def __init__(self) -> None:
        self._kept: dict[int, _Copy] = {}

    def own(self, given: Any) -> Any:
        """Our own copy of a tokenizer, or of a processor that holds one."""
        if functions_of(given):  # which may mean the program's own pipeline
            return unsettled(given)
        kept, now = self._kept.get(id(given)), _settings(given)
        if kept is None or not _same(kept.was, now):
            if kept is None and len(self._kept) == _KEPT:
                self._kept.clear()
            own = unsettled(given)
            kept = self._kept[id(given)] = _Copy(given, unsettled(now), own)
        return kept.own


def _same(was: dict[str, Any], now: dict[str, Any]) -> bool:
    try:
        return was == now
    except Exception as fault:  # noqa: BLE001 - of what the application has put into a list: then it is copied anew
        log.debug("a tokenizer's settings cannot be compared: %s", raised(fault))
        return False


def _settings(given: Any) -> dict[str, Any]:
    """What an application may have changed: class, attributes (a chat template), stages, and how many tokens there are.

    Not the padding and truncation within its backend, nor what it notes about its own calls; nor the tokens themselves,
    which take too long to be compared with every request.
    """
    found: dict[str, Any] = {}
    for name, value in vars(given).items():
        if untyped.is_tokenizer(value):
            found[name] = _settings(value)
        elif issubclass(type(value), _PLAIN) or (
            issubclass(type(value), _HOLDERS) and len(cast("Sized", value)) < _LARGE
        ):
            found[name] = cast("object", value)
        else:
            found[name] = id(value)
    stages = (getattr(getattr(given, "backend_tokenizer", None), name, None) for name in _STAGES)
    states = [stage and stage.__getstate__() for stage in stages]
    return found | {"": (type(given), states, len(given) if hasattr(given, "__len__") else 0)}
