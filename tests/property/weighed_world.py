"""The world with one more dimension: requests hold bytes, and the worker has a room for them."""

from __future__ import annotations

from scheduler_world import World

from steploom.protocol import RequestReport, SchedulerOutput


def weight(shape: int) -> int:
    """Bytes that a request of a shape keeps: the same for all of one observed key, in a stable world."""
    return 1 + 2 * (shape // 2)


class WeighedWorld(World):
    """Nobody joins whose bytes, as far as they are known, do not fit beside those of the other residents.

    Attributes:
        room: Bytes that the worker has for requests; 0 if it cannot say.
    """

    room = 0

    def execute(self) -> None:
        flight = next(flight for flight in self.flights if flight.result is None)
        super().execute()
        if flight.result is not None:  # else its worker died of it
            flight.result.room_bytes = self.room

    def _advance(self, run: str, mates: int) -> RequestReport:
        report = super()._advance(run, mates)
        if report.batch_key is not None:
            report.held_bytes = weight(self.programs[run].shape)
        return report

    def _check_capacity(self, output: SchedulerOutput, joined: list[str], waiting: object, resident: object) -> None:
        super()._check_capacity(output, joined, waiting, resident)
        members = [*self.resident.values(), *(self.live[name] for name in joined)]
        known = all(one.observed or one.program.shape in self.learned for one in members)
        if self.stable and joined and len(members) > 1 and known and self.scheduler.costs.room_bytes:
            assert sum(weight(one.program.shape) for one in members) <= self.room

    def _kept_free(self, output: SchedulerOutput) -> bool:
        """A place may be free for want of bytes, of this group or of one that has waited for too long."""
        return bool(self.room) or super()._kept_free(output)
