"""Generators that the application gave: a request works on copies, so that its seed is what it was at acceptance."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, cast

from steploom.requests import DiffusionOutput, DiffusionRequest

log = logging.getLogger(__name__)


class Borrowed:
    """The generators among a request's arguments, and the copies that it draws from.

    Two requests that are accepted with one generator start from the same state, whichever runs first. A request that
    is done leaves the application's generator as ``pipe(...)`` would have: advanced. Other processes get what the
    copies are at acceptance, as often as the request begins again, and tell where theirs have come to.

    Args:
        request: As the application made it; it was checked.

    Attributes:
        request: The same with the copies in place of the generators.
        accepted: When, by ``time.monotonic()``.
    """

    def __init__(self, request: DiffusionRequest) -> None:
        self.request = request
        self.accepted = time.monotonic()
        self._given: Sequence[Any] = request.generators
        self._own: list[Any] = []
        self._starts: list[Any] = []
        if self._given:
            self._own = [generator.clone_state() for generator in self._given]
            self._starts = [own.get_state() for own in self._own]
            given: Any = request.params["generator"]
            copies = dict(zip(map(id, self._given), self._own, strict=True))
            several = isinstance(given, (list, tuple))
            own = [copies[id(one)] for one in cast("list[Any]", given)] if several else copies[id(given)]
            self.request = request.with_params(generator=own)

    def rewind(self) -> None:
        """The request begins again: so do the copies."""
        for own, start in zip(self._own, self._starts, strict=True):
            own.set_state(start)

    def give_back(self, output: DiffusionOutput) -> None:
        """The request is done: advances the application's generators to where it has left the copies."""
        states = output.generator_states or [own.get_state() for own in self._own]
        try:
            for generator, state in zip(self._given, states, strict=True):
                generator.set_state(state)
        except (ValueError, TypeError, RuntimeError) as error:  # the states are another process's word
            log.warning("request %s leaves generator= as it was: %s", self.request.request_id, error)
