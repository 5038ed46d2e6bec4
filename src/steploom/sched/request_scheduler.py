"""RequestScheduler: one request at a time, from start to end."""

from __future__ import annotations

from steploom.sched.base_scheduler import BaseScheduler
from steploom.sched.policy import Batch


class RequestScheduler(BaseScheduler):
    """One request to completion, then the next: nothing is shared, and nobody waits for a mate.

    For comparison, and for models whose calls can never be merged.
    """

    @property
    def room(self) -> tuple[int, int]:
        """One place, and a batch of one."""
        places = max(0, 1 - self._held)
        return places, places

    def _choose(self) -> Batch:
        return self._allowed(self.policy.choose(1, 1 - self._held), 1, 1 - self._held)

    def _extend(self, members: list[str]) -> Batch:
        batch = self.policy.extend(members, 1, 1 - self._held)
        return self._allowed(batch, 1 - len(members), 1 - self._held)
