"""Requests that wait for what runs beside the ticks keep their place with the worker, and take none in a batch."""

from __future__ import annotations

from sched_harness import Harness, names

from steploom.errors import RequestCancelled
from steploom.protocol import RunnerOutput
from steploom.requests import Restarted
from steploom.sched import Batch, Policy, RequestState


def tick(h: Harness, *aside: str) -> list[str]:
    """A tick after which those of ``aside`` wait beside the ticks; its members."""
    output = h.scheduler.schedule()
    reports = [
        h.report(run, aside=True, stepped=False, finished=False) if run.rpartition("#")[0] in aside else h.report(run)
        for run in output.run_ids
    ]
    h.scheduler.update_from_output(output, RunnerOutput(tick=output.tick, reports=reports))
    return names(output)


def test_a_batch_is_filled_up_while_somebody_decodes() -> None:
    h = Harness(max_batch=2, max_resident=3)
    h.add("a", "b", "c", "d", steps=9)
    assert tick(h) == ["a", "b"]
    assert tick(h, "a") == ["a", "b"]
    assert tick(h, "a") == ["b", "a", "c"], "a takes no row, and is asked after in every tick"
    assert tick(h, "a", "b") == ["b", "c", "a"]
    assert tick(h, "a", "b") == ["c", "a", "b"], "max_resident bounds those that wait as well"
    assert tick(h) == ["c", "a", "b"]
    assert tick(h) == ["a", "b"], "back, and the oldest again"


def test_an_amendment_fills_the_places_of_those_aside() -> None:
    h = Harness(max_batch=2, max_resident=4)
    h.add("a", steps=9)
    tick(h, "a")
    first, second = h.scheduler.schedule(), h.scheduler.schedule()
    assert names(first) == names(second) == ["a"]
    h.add("b", "c")
    amendment = h.scheduler.amend()
    assert amendment is not None
    assert names(amendment) == ["b", "c"], "a takes no place"


def test_who_decodes_beside_the_ticks_after_its_last_step_is_not_lost() -> None:
    """Its end was expected, so that the tick ahead does not name it."""
    h = Harness(max_batch=2)
    h.add("a", steps=9, num_inference_steps=2)
    h.add("b", steps=9)
    first = h.scheduler.schedule()
    reports = [h.report(first.run_ids[0], total_steps=2), h.report(first.run_ids[1])]
    h.scheduler.update_from_output(first, RunnerOutput(tick=first.tick, reports=reports))
    last, ahead = h.scheduler.schedule(), h.scheduler.schedule()
    assert (names(last), names(ahead)) == (["a", "b"], ["b"])
    told = {"phase": "decode", "aside": True, "total_steps": 2}
    reports = [h.report(last.run_ids[0], **told), h.report(last.run_ids[1])]
    h.scheduler.update_from_output(last, RunnerOutput(tick=last.tick, reports=reports))
    extra = h.report(last.run_ids[0], **told, stepped=False)
    reports = [h.report(last.run_ids[1]), extra]
    assert len(h.scheduler.update_from_output(ahead, RunnerOutput(tick=ahead.tick, reports=reports))) == 1
    assert tick(h, "a") == ["b", "a"]
    h.drain()


def test_who_is_aside_and_not_mentioned_is_lost() -> None:
    h = Harness(max_batch=2)
    h.add("a", "b", steps=9)
    tick(h, "a")
    output = h.scheduler.schedule()
    restarted = [event for event in h.answer(output, without=("a",)) if isinstance(event, Restarted)]
    assert [event.request_id for event in restarted] == ["a"]
    assert tick(h) == ["b", "a"]
    h.drain()


def test_ticks_of_those_alone_who_wait() -> None:
    h = Harness(max_batch=2)
    h.add("a", height=512)
    tick(h, "a")
    h.add("b", height=768)
    assert tick(h, "a", "b") == ["a", "b"], "whatever its shape, it delays nobody"
    assert tick(h, "a", "b") == ["a", "b"]
    h.scheduler.finish_requests(["a"], RequestCancelled("enough"))
    output = h.scheduler.schedule()
    assert names(output) == ["b"]
    assert [run.rpartition("#")[0] for run in output.finished_req_ids] == ["a"]
    h.answer(output, finished=True, aside=False)
    assert not h.scheduler.has_work
    assert h.scheduler.num_running == 0


def test_replayed_after_its_worker_died() -> None:
    h = Harness()
    h.add("a", "b")
    tick(h, "a")
    h.scheduler.restart()
    assert tick(h) == ["a", "b"]
    h.drain()


class Old(Policy):
    """First come first served, from before there was anything beside the ticks."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self.waiting: list[RequestState] = []
        self.residents: list[RequestState] = []

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        self.waiting.append(state)

    def withdraw(self, state: RequestState) -> None:
        self.waiting.remove(state)

    def retire(self, state: RequestState) -> None:
        self.residents.remove(state)

    def observe(self, state: RequestState) -> None: ...

    def choose(self, max_batch: int, free: int) -> Batch:
        cached = [state.run_id for state in self.residents]
        joining = [self.waiting.pop(0) for _ in range(min(free, max_batch - len(cached), len(self.waiting)))]
        self.residents += joining
        return Batch(None, cached, joining)


def test_a_policy_that_cannot_be_told_counts_them_all_the_same() -> None:
    h = Harness(max_batch=1, policy=Old)
    h.add("a", "b")
    assert tick(h, "a") == ["a"]
    assert tick(h, "a") == ["a"]
    h.drain()
