"""The mailbox: bounded, truthful, and never without its outcome."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploom import (
    Commit,
    DiffusionOutput,
    Draft,
    EngineDead,
    Finished,
    Queued,
    RequestCancelled,
    Restarted,
    StepEvent,
    WorkerDied,
)  # fmt: skip
from steploom.engine.mailbox import Mailbox, fresh
from steploom.engine.recovery import cause
from steploom.requests import Failed
from steploom.server.errors import outward

FINISHED = Finished(request_id="r", output=DiffusionOutput(request_id="r"))


def step(number: int, latents: object = None, preview: object = None) -> StepEvent:
    return StepEvent(request_id="r", step=number, latents=latents, preview=preview)


async def drained(mailbox: Mailbox) -> list[object]:
    events: list[object] = []
    while (event := await mailbox.next()) is not None:
        events.append(event)
    return events


async def test_a_fast_reader_gets_every_event() -> None:
    mailbox, seen = Mailbox(), []
    events = [Queued(request_id="r"), step(1), step(2), FINISHED]
    for event in events:
        mailbox.put(event)
        seen.append(await mailbox.next())
    assert seen == events
    assert await mailbox.next() is None


async def test_a_slow_reader_gets_the_latest_step_and_the_outcome() -> None:
    mailbox = Mailbox()
    mailbox.put(Queued(request_id="r"))
    for number in range(1, 100):
        mailbox.put(step(number))
    mailbox.put(FINISHED)
    assert await drained(mailbox) == [Queued(request_id="r"), step(99), FINISHED]


async def test_the_newest_latents_and_the_newest_preview_survive_conflation_unchanged() -> None:
    mailbox = Mailbox()
    for event in (step(1, latents="a"), step(2, preview="b"), step(3, latents="c"), step(4), step(5)):
        mailbox.put(event)
    mailbox.put(FINISHED)
    assert await drained(mailbox) == [step(2, preview="b"), step(3, latents="c"), step(5), FINISHED]


@given(st.lists(st.tuples(st.sampled_from(["step", "restart", "read"]), st.booleans(), st.booleans()), max_size=40))
def test_it_is_bounded_ordered_and_keeps_the_newest_of_each_kind(script: list[tuple[str, bool, bool]]) -> None:
    async def main() -> None:
        mailbox, read = Mailbox(), []
        mailbox.put(Queued(request_id="r"))
        newest: dict[str, int] = {}
        for number, (kind, latents, preview) in enumerate(script):
            if kind == "read" and len(mailbox):
                read.append(await mailbox.next())
            elif kind == "restart":
                mailbox.put(Restarted(request_id="r", attempt=number))
                newest = {}
            elif kind == "step":
                mailbox.put(step(number, "l" if latents else None, "p" if preview else None))
                newest |= {"step": number} | ({"latents": number} if latents else {})
                newest |= {"preview": number} if preview else {}
            assert len(mailbox) <= 5
        mailbox.put(FINISHED)
        assert len(mailbox) <= 6
        read += await drained(mailbox)
        steps = [event for event in read if isinstance(event, StepEvent)]
        assert [event.step for event in steps] == sorted(event.step for event in steps)
        for kind, number in newest.items():
            assert number in [event.step for event in steps if kind == "step" or getattr(event, kind) is not None]
        assert read[0] == Queued(request_id="r")
        assert read[-1] is FINISHED

    anyio.run(main)


async def test_a_restart_discards_the_steps_of_the_lost_attempt() -> None:
    mailbox = Mailbox()
    for event in (step(7, latents="old"), Restarted(request_id="r", attempt=1), step(1), FINISHED):
        mailbox.put(event)
    assert await drained(mailbox) == [Restarted(request_id="r", attempt=1), step(1), FINISHED]


async def test_nothing_follows_the_outcome() -> None:
    mailbox = Mailbox()
    mailbox.put(FINISHED)
    mailbox.put(step(3))
    mailbox.fail(EngineDead("late"))
    assert await drained(mailbox) == [FINISHED]
    assert (await mailbox.outcome()).request_id == "r"


async def test_a_failure_comes_after_what_is_unread_and_to_everybody() -> None:
    mailbox = Mailbox()
    mailbox.put(step(3))
    mailbox.put(Failed(request_id="r", error=RequestCancelled("gone")))
    assert await mailbox.next() == step(3)
    for read in (mailbox.next, mailbox.next, mailbox.outcome):
        with pytest.raises(RequestCancelled, match="gone"):
            await read()


async def test_waiting_readers_wake_up() -> None:
    mailbox, seen = Mailbox(), []

    async def read() -> None:
        seen.extend(await drained(mailbox))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(mailbox.outcome)
        await anyio.wait_all_tasks_blocked()
        mailbox.put(step(1))
        await anyio.wait_all_tasks_blocked()
        mailbox.put(FINISHED)
    assert seen == [step(1), FINISHED]


def test_fresh_copies_keep_what_an_error_says_and_drop_its_frames() -> None:
    try:
        raise WorkerDied(3, -9, "out of memory")
    except WorkerDied as error:
        error.add_note("a note")
        copy = fresh(error)
    assert isinstance(copy, WorkerDied)
    assert (copy.rank, copy.exitcode) == (3, -9)
    assert str(copy) == "worker 3 died with exit code -9: out of memory"
    assert copy.__notes__ == ["a note"]
    assert copy.__traceback__ is None


@pytest.mark.parametrize(("exitcode", "says"), [(-9, "worker 3 died with exit code -9"), (None, "worker 3 died")])
def test_an_exit_code_is_said_where_there_is_one_and_what_was_printed_only_in_the_log(
    exitcode: int | None, says: str
) -> None:
    error = WorkerDied(3, exitcode, "the engine's\nsecrets")
    assert str(error) == f"{says}: the engine's\nsecrets"
    assert cause(error) == outward(error) == says


def commit(text: str | None, *tokens: int) -> Commit:
    return Commit(request_id="r", text=text, tokens=list(tokens))


def draft(text: str) -> Draft:
    return Draft(request_id="r", text=text, tokens=[])


async def test_commits_are_joined_and_the_newest_draft_stays() -> None:
    mailbox = Mailbox()
    for event in (draft("x"), commit("one ", 1), step(4, latents="l"), draft("y"), commit("two ", 2, 3), draft("z"),
                  draft("three"), step(5)):  # fmt: skip
        mailbox.put(event)
    assert await mailbox.next() == commit("one two ", 1, 2, 3)
    mailbox.put(commit("three", 4))
    mailbox.put(FINISHED)
    assert await drained(mailbox) == [step(4, latents="l"), step(5), commit("three", 4), FINISHED]


async def test_commits_of_several_rows_and_without_text_are_joined() -> None:
    mailbox = Mailbox()
    mailbox.put(Commit(request_id="r", text=["a", "b"], tokens=[[1], []]))
    mailbox.put(Commit(request_id="r", text=["", "c"], tokens=[[], [2, 3]]))
    assert await mailbox.next() == Commit(request_id="r", text=["a", "bc"], tokens=[[1], [2, 3]])
    mailbox.put(commit(None, 1))
    mailbox.put(commit(None, 2))
    assert await mailbox.next() == commit(None, 1, 2)


async def test_a_restart_discards_the_text_of_the_lost_attempt() -> None:
    mailbox = Mailbox()
    for event in (commit("old"), draft("old"), Restarted(request_id="r", attempt=1), commit("new"), FINISHED):
        mailbox.put(event)
    assert await drained(mailbox) == [Restarted(request_id="r", attempt=1), commit("new"), FINISHED]


async def test_a_slow_reader_keeps_eight_events_at_most_and_all_of_the_text() -> None:
    mailbox = Mailbox()
    mailbox.put(Queued(request_id="r"))
    mailbox.put(Restarted(request_id="r", attempt=1))
    for number in range(1, 60):
        mailbox.put(step(number, "l" if number % 3 else None, "p" if number % 2 else None))
        mailbox.put(commit(f"{number} ", number))
        mailbox.put(draft("next"))
        assert len(mailbox) <= 7
    mailbox.put(FINISHED)
    assert len(mailbox) <= 8
    read = await drained(mailbox)
    assert [event.text for event in read if isinstance(event, Commit)] == ["".join(f"{n} " for n in range(1, 60))]
