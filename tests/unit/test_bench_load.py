"""The open-loop driver: on a clock of its own, and against a pretended engine."""

from __future__ import annotations

import anyio
import pytest

from steploom.cli.benches import standalone
from steploom.cli.benches.joins import Joins
from steploom.cli.benches.load import Answer, Load
from steploom.cli.benches.targets import Asking, EngineTarget
from steploom.cli.benches.workloads import Arrival, w4
from steploom.testing import FakeEngine


def at(*times: float) -> list[Arrival]:
    return [Arrival(time, 32, 32, 4) for time in times]


class Clock:
    """Time goes on only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await anyio.wait_all_tasks_blocked()
        self.now += seconds


class Hanging:
    """Never answers until it is told to."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.go = anyio.Event()

    async def send(self, index: int, arrival: Arrival) -> Answer:
        self.sent.append(index)
        await self.go.wait()
        return Answer(steps=arrival.steps)


async def test_requests_are_sent_at_their_times_though_none_is_answered():
    clock, target = Clock(), Hanging()
    load = Load(target, at(3.0, 0.5, 1.0), now=clock, sleep=clock.sleep)
    async with anyio.create_task_group() as group:
        group.start_soon(load.run)
        await anyio.wait_all_tasks_blocked()
        assert target.sent == [1, 2, 0]  # in the order of their times, by their index in the workload
        assert (load.in_flight, load.peak, load.outcomes) == (3, 3, [])
        clock.now += 2
        target.go.set()
    by_index = {one.index: one for one in load.outcomes}
    assert [by_index[i].sent_s for i in range(3)] == pytest.approx([3.0, 0.5, 1.0])
    assert [by_index[i].latency_s for i in range(3)] == pytest.approx([2.0, 4.5, 4.0])
    assert all(one.lateness_s == pytest.approx(0) for one in load.outcomes)
    assert load.duration_s == pytest.approx(5.0)


async def test_what_waits_in_the_client_counts_and_lateness_says_so():
    clock, target = Clock(), Hanging()
    load = Load(target, at(0.0, 1.0), limit=1, now=clock, sleep=clock.sleep)
    async with anyio.create_task_group() as group:
        group.start_soon(load.run)
        await anyio.wait_all_tasks_blocked()
        assert target.sent == [0]
        clock.now += 4
        target.go.set()
    late = next(one for one in load.outcomes if one.index == 1)
    assert (late.lateness_s, late.latency_s) == (pytest.approx(4), pytest.approx(4))
    assert load.peak == 1


async def test_in_a_closed_loop_a_request_is_due_when_there_is_a_place():
    clock, target = Clock(), Hanging()
    load = Load(target, at(0.0, 0.0), limit=1, closed=True, now=clock, sleep=clock.sleep, first=10)
    async with anyio.create_task_group() as group:
        group.start_soon(load.run)
        await anyio.wait_all_tasks_blocked()
        clock.now += 4
        target.go.set()
    assert [(one.index, one.latency_s, one.lateness_s) for one in load.outcomes] == [(10, 4, 0), (11, 0, 0)]


async def test_a_failure_is_its_requests_own_and_a_timeout_is_one():
    class Moody(Hanging):
        async def send(self, index: int, arrival: Arrival) -> Answer:
            if index == 0:
                raise ValueError("one\nline")
            return await super().send(index, arrival)

    changes: list[tuple[int, int, int]] = []
    load = Load(
        Moody(), at(0.0, 0.0), timeout_s=0.01, on_change=lambda it: changes.append((it.sent, it.in_flight, it.failed))
    )
    await load.run()
    assert {one.index: one.error for one in load.outcomes} == {
        0: "ValueError: one line", 1: "timeout: no answer within 0.01 s",
    }  # fmt: skip
    assert load.failed == 2
    assert changes[-1] == (2, 0, 2)


async def test_cancelled_it_keeps_what_there_is_so_far():
    async with FakeEngine(max_batch=1) as engine:
        two = anyio.Event()
        load = Load(
            EngineTarget(engine, Asking()),
            at(0.0, 0.0, 3600.0),
            on_change=lambda load: two.set() if len(load.outcomes) == 2 else None,
        )
        async with anyio.create_task_group() as group:
            group.start_soon(load.run)
            await two.wait()
            group.cancel_scope.cancel()
        assert [one.error for one in load.outcomes] == [None, None]
        assert 0 < load.duration_s < 3600
        assert engine.num_running == 0


async def test_an_engine_gets_what_the_workload_says_and_figures_agree_with_its_timings():
    seen, together = [], []

    class Spy(Joins):
        def on_queued(self, request) -> None:
            super().on_queued(request)
            seen.append(request)

        def on_tick(self, output, result, began, ended) -> None:
            super().on_tick(output, result, began, ended)
            together.append(len(result.reports))  # of a pretended engine: all of them in one call, two rows each

    async with FakeEngine(max_batch=4) as engine:
        joins = Spy(4)
        engine.observers.append(joins)
        arrivals = [Arrival(0, 32, 48, 3, 2, "ann", 1, 9.0), *w4(3, 32, 3)]
        load = Load(EngineTarget(engine, Asking(seed=5, params={"guidance_scale": 2.0})), arrivals)
        await load.run()
    first = next(one for one in seen if one.user == "ann")
    assert (first.priority, first.deadline, first.seed) == (1, 9.0, Asking(seed=5).seed_of(0))
    assert first.params == {"guidance_scale": 2.0, "num_inference_steps": 3, "width": 32, "height": 48,
                            "num_images_per_prompt": 2}  # fmt: skip
    assert len({one.prompt for one in seen}) == 4
    assert len({one.seed for one in seen}) == 4
    answers = [one.answer for one in load.outcomes if one.answer is not None]
    assert [one.steps for one in answers] == [3] * 4
    calls = [many for many in together if many]
    assert sum(calls) == 4 * 3
    assert joins.mean_rows == pytest.approx(2 * sum(calls) / len(calls))
    assert sum(one.steps * one.mean_batch_requests for one in answers) == pytest.approx(sum(n * n for n in calls))
    assert sum(one.images for one in answers) == 5


async def test_previews_are_asked_for_and_the_first_is_timed():
    async with FakeEngine() as engine:
        load = Load(EngineTarget(engine, Asking(previews=True)), w4(2, 32, 4))
        await load.run()
    for one in load.outcomes:
        assert one.first_preview_s is not None
        assert one.sent_s <= one.first_preview_s <= one.ended_s


async def test_a_join_delay_is_the_steps_that_others_made_meanwhile():
    async with FakeEngine(max_batch=2, run_ahead=False) as engine:
        joins = Joins(2)
        engine.observers.append(joins)
        engine.hold()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.generate("a", request_id="first", num_inference_steps=9))
            await engine.held()
            group.start_soon(lambda: engine.generate("b", request_id="second", num_inference_steps=3))
            await anyio.wait_all_tasks_blocked()
            engine.release(2)  # the step under way, and the one that `second` joins in
            await engine.held()
            group.start_soon(lambda: engine.generate("c", request_id="third", num_inference_steps=1))
            await anyio.wait_all_tasks_blocked()
            engine.release()
    found = {join.request_id: (join.delay_steps, join.slot_free) for join in joins.joins}
    assert found == {"first": (0, True), "second": (1, True), "third": (2, False)}
    assert joins.figures()["p99_join_delay_steps_slot_free"] == pytest.approx(0.99)
    assert joins.figures()["joins_with_slot_free"] == 2


async def test_alone_is_one_after_the_other_and_the_median():
    took = iter([1.0, 5.0, 3.0])
    clock = Clock()

    class Slow:
        running = 0

        async def send(self, index: int, arrival: Arrival) -> Answer:
            self.running += 1
            assert self.running == 1
            await clock.sleep(next(took))
            self.running -= 1
            return Answer()

    found = await standalone.measure(Slow(), w4(3, 32, 4), repeats=3, now=clock)
    assert found.measured == {(32, 32, 4, 1): 3.0}
