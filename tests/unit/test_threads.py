"""Threads that the library has to itself: as many as there are places, in each event loop."""

from __future__ import annotations

import threading

import anyio
import pytest
from anyio import to_thread

from steploom.threads import OneThread, Threads, at_once

PLACES = Threads("tests", 2)


@pytest.mark.parametrize("turn", range(2))  # each in an event loop of its own
async def test_no_more_run_side_by_side_than_there_are_places(turn: int) -> None:
    running, released = threading.Semaphore(0), threading.Event()
    results: list[int] = []

    def call(number: int) -> int:
        running.release()
        assert released.wait(20)
        return number

    async def run(number: int) -> None:
        results.append(await PLACES.run(call, number))

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(run, number)
        await anyio.wait_all_tasks_blocked()
        assert [running.acquire(timeout=20) for _ in range(2)] == [True, True]
        assert not running.acquire(blocking=False)
        released.set()
    assert sorted(results) == list(range(5))


async def test_what_an_owner_does_one_at_a_time_waits_for_no_place() -> None:
    to_thread.current_default_thread_limiter().total_tokens = 1
    released = threading.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(to_thread.run_sync, released.wait)
        for _ in range(20):
            group.start_soon(at_once, released.wait)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(20):
            await at_once(released.set)


async def test_who_is_cancelled_may_leave_a_thread_to_itself() -> None:
    released = threading.Event()
    with anyio.move_on_after(0.01) as scope:
        await at_once(released.wait, 20, abandon_on_cancel=True)
    assert scope.cancelled_caught
    released.set()


def test_one_thread_runs_calls_in_order_and_ends() -> None:
    thread, done = OneThread("tests"), list[tuple[int, str]]()
    for number in range(3):
        thread.run(lambda number=number: done.append((number, threading.current_thread().name)))
    thread.end(wait=True)
    assert done == [(number, "tests") for number in range(3)]
    assert "tests" not in {one.name for one in threading.enumerate()}


def test_one_thread_that_was_never_asked_never_was() -> None:
    OneThread("tests").end(wait=True)
