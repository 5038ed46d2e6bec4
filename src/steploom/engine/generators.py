"""Generators that the application gave: a request works on copies, so that its seed is what it was at acceptance."""

from __future__ import annotations

import time
from typing import Any, cast

from steploom.errors import InvalidRequest
from steploom.requests import DiffusionRequest


class Borrowed:
    """The generators among a request's arguments, and the copies that it draws from.

    Two requests that are accepted with one generator start from the same state, whichever runs first. A request that
    is done leaves the application's generator as ``pipe(...)`` would have: advanced.

    Args:
        request: As the application made it.

    Raises:
        InvalidRequest: What was given is no generator of torch.

    Attributes:
        request: The same with the copies in place of the generators.
        accepted: When, by ``time.monotonic()``.
    """

    def __init__(self, request: DiffusionRequest) -> None:
        self.request = request
        self.accepted = time.monotonic()
        self._pairs: list[tuple[Any, Any]] = []
        self._starts: list[Any] = []
        given: Any = request.params.get("generator")
        if given is None:
            return
        several = isinstance(given, (list, tuple))
        if several and not given:
            raise InvalidRequest("generator=[]: is empty; give one per image, or seed=...", field="generator")
        own = [self._copy(one) for one in cast("list[Any]", given)] if several else self._copy(given)
        self.request = request.with_params(generator=own)

    def _copy(self, generator: Any) -> Any:
        if not hasattr(generator, "clone_state"):
            raise InvalidRequest(
                f"generator={generator!r}: must be a torch.Generator, or a list of one per image; or give seed=...",
                field="generator",
            )
        own = generator.clone_state()
        self._pairs.append((generator, own))
        self._starts.append(own.get_state())
        return own

    def rewind(self) -> None:
        """The request begins again: so do the copies."""
        for (_, own), start in zip(self._pairs, self._starts, strict=True):
            own.set_state(start)

    def give_back(self) -> None:
        """The request is done: advances the application's generators to where the copies are."""
        for generator, own in self._pairs:
            generator.set_state(own.get_state())
