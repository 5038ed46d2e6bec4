"""StepScheduler: requests join and leave the batch between denoising steps."""

from __future__ import annotations

from steploom.sched.base_scheduler import BaseScheduler
from steploom.sched.policy import Batch


class StepScheduler(BaseScheduler):
    """Continuous batching: up to ``max_batch`` requests step in a tick, each at its own step.

    Up to ``resident_limit`` requests are held by a worker, so that several batch keys can take turns.
    """

    def _choose(self) -> Batch:
        max_batch, free = self.config.batch_limit, self.config.resident_limit - self._held
        return self._allowed(self.policy.choose(max_batch, free), max_batch, free)

    def _extend(self, members: list[str]) -> Batch:
        max_batch, free = self.config.batch_limit, self.config.resident_limit - self._held
        return self._allowed(self.policy.extend(members, max_batch, free), max_batch - len(members), free)
