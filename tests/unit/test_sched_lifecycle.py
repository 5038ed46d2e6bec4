"""Acceptance, outcomes, aborts, replays: the states of a request, and what the workers are told."""

from __future__ import annotations

import pytest
from sched_harness import Harness, names

from steploom.errors import GenerationFailed, InvalidRequest, ProtocolError, QueueFull, RequestCancelled
from steploom.protocol import ErrorInfo, RequestReport, RunnerOutput, request_id_of
from steploom.requests import DiffusionRequest, Failed, Finished, Queued, Restarted, StepEvent, Timings

ENOUGH = RequestCancelled("enough")


def test_queue_is_bounded_and_says_so() -> None:
    h = Harness(max_waiting=2)
    assert h.scheduler.add_request(DiffusionRequest(request_id="a")) == Queued(request_id="a", position=0)
    assert h.scheduler.add_request(DiffusionRequest(request_id="b")) == Queued(request_id="b", position=1)
    with pytest.raises(QueueFull, match="max_waiting=2"):
        h.scheduler.add_request(DiffusionRequest(request_id="c"))
    assert h.scheduler.num_waiting == 2
    h.scheduler.schedule()
    h.scheduler.add_request(DiffusionRequest(request_id="c"))  # Residents do not wait.
    assert (h.scheduler.num_waiting, h.scheduler.num_running) == (1, 2)


def test_id_of_a_live_request_is_refused_and_of_a_dead_one_taken() -> None:
    h = Harness()
    h.add("a")
    with pytest.raises(InvalidRequest, match="request_id='a'") as caught:
        h.add("a")
    assert caught.value.field == "request_id"
    h.scheduler.finish_requests(["a"], ENOUGH)
    h.add("a")
    assert h.drain() == 2


def test_priority_must_be_an_integer() -> None:
    h = Harness()
    with pytest.raises(InvalidRequest, match="priority='high'"):
        h.add("a", priority="high")
    assert not h.scheduler.has_work


def test_first_tick_carries_the_payload_and_later_ones_the_id() -> None:
    h = Harness()
    h.add("a")
    first = h.scheduler.schedule()
    assert [new.request.request_id for new in first.scheduled_new_reqs] == ["a"]
    assert (first.tick, first.scheduled_cached_reqs, first.batch_key) == (1, [], None)
    h.answer(first)
    second = h.scheduler.schedule()
    assert (second.tick, second.scheduled_new_reqs) == (2, [])
    assert second.scheduled_cached_reqs == [first.scheduled_new_reqs[0].run_id]
    assert second.batch_key == "key512"


def test_outcome_carries_timings_seed_and_trajectory() -> None:
    h = Harness()
    h.now = 10.0
    h.add("a", steps=3)
    h.now = 12.0
    h.tick(stepped=False, batch_requests=0, encode_s=0.5, phase="encode")
    h.tick(batch_requests=2, denoise_s=0.25, encode_s=0.25)
    h.now = 17.0
    _, (step, outcome) = h.tick(
        batch_requests=5, denoise_s=0.25, decode_s=2.0, output="image", trajectory_latents="L", trajectory_timesteps="T"
    )
    assert step == StepEvent(request_id="a", step=3, batch_requests=5)
    assert isinstance(outcome, Finished)
    assert outcome.output.timings == Timings(
        queued_s=2.0, encode_s=0.75, denoise_s=0.5, decode_s=2.0, total_s=7.0, steps=2, mean_batch_requests=3.5
    )
    result = outcome.output
    assert (result.request_id, result.seed, result.output) == ("a", 1, "image")
    assert (result.trajectory_latents, result.trajectory_timesteps) == ("L", "T")


def test_step_event_carries_what_the_worker_streams() -> None:
    h = Harness()
    h.add("a", steps=9)
    streamed = {"stage": "prior", "total_steps": 9, "sigma": 0.5, "latents": "L", "preview": "P"}
    assert h.tick(**streamed)[1] == [StepEvent(request_id="a", step=1, batch_requests=1, **streamed)]


def test_failed_program_fails_its_request_alone() -> None:
    h = Harness()
    h.add("a", "b", steps=5)
    output = h.scheduler.schedule()
    run_a, run_b = output.run_ids
    poison = RequestReport(run_id=run_a, finished=True, error=ErrorInfo("ValueError", "bad prompt", "Traceback ..."))
    events = h.scheduler.update_from_output(output, RunnerOutput(tick=1, reports=[poison, h.report(run_b)]))
    failed, step = events
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailed)
    assert (str(failed.error), failed.error.remote_traceback) == ("bad prompt", "Traceback ...")
    assert step == StepEvent(request_id="b", step=1, batch_requests=1)
    assert h.tick()[0] == ["b"]


def test_error_that_ends_engines_ends_only_the_request() -> None:
    h = Harness()
    h.add("a")
    (failed,) = h.tick(stepped=False, finished=True, error=ErrorInfo("EngineDead", "says the pipeline"))[1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailed)


def test_answer_to_another_tick_is_refused() -> None:
    h = Harness()
    h.add("a")
    output = h.scheduler.schedule()
    with pytest.raises(ProtocolError, match="tick=7"):
        h.scheduler.update_from_output(output, RunnerOutput(tick=7))


def test_abort_of_a_waiting_request_concerns_no_worker() -> None:
    h = Harness()
    h.add("a")
    assert h.scheduler.finish_requests(["unknown", "a", "a"], ENOUGH) == [Failed(request_id="a", error=ENOUGH)]
    assert not h.scheduler.has_work
    assert h.scheduler.schedule().finished_req_ids == []


def test_deferred_free() -> None:
    """vLLM-Omni kept the worker's state of an aborted request until another one arrived."""
    h = Harness()
    h.add("a")
    (run,) = h.scheduler.schedule().run_ids
    h.scheduler.finish_requests(["a"], ENOUGH)
    assert h.scheduler.num_running == 0
    assert h.scheduler.has_work, "although no request is alive"
    output = h.scheduler.schedule()
    assert (output.run_ids, output.finished_req_ids) == ([], [run])
    assert not h.scheduler.has_work
    assert h.scheduler.schedule().finished_req_ids == [], "told once"


def test_lost_abort_in_last_tick_of_last_request() -> None:
    """vLLM-Omni gave no terminal event until another request arrived."""
    h = Harness()
    h.add("a", steps=1)
    output = h.scheduler.schedule()
    assert h.scheduler.finish_requests(["a"], ENOUGH) == [Failed(request_id="a", error=ENOUGH)]
    assert h.answer(output) == [], "one outcome: the abort came first"
    assert not h.scheduler.has_work, "the worker has dropped the program by itself"


def test_abort_frees_the_slot_in_the_tick_that_tells_the_worker() -> None:
    h = Harness(max_batch=1, max_resident=1)
    h.add("a", "b")
    (run,) = h.scheduler.schedule().run_ids
    h.scheduler.finish_requests(["a"], ENOUGH)
    output = h.scheduler.schedule()
    assert (names(output), output.finished_req_ids) == (["b"], [run])


def test_request_that_finished_in_the_tick_before_is_ignored() -> None:
    h = Harness()
    h.add("a", steps=1)
    first, second = h.scheduler.schedule(), h.scheduler.schedule()
    assert first.run_ids == second.run_ids, "it stands in both ticks in flight"
    assert [type(event) for event in h.answer(first)] == [StepEvent, Finished]
    assert h.answer(second, without=("a",)) == []
    assert not h.scheduler.has_work


def test_late_answer_is_not_taken_for_a_new_request_of_the_same_id() -> None:
    h = Harness()
    h.add("a", steps=9)
    late = h.scheduler.schedule()
    h.scheduler.finish_requests(["a"], ENOUGH)
    h.add("a", steps=9)
    current = h.scheduler.schedule()
    assert current.finished_req_ids == late.run_ids != current.run_ids
    assert h.answer(late, finished=True) == []
    assert h.scheduler.num_running == 1
    assert h.answer(current) == [StepEvent(request_id="a", step=1, batch_requests=1)]


def test_replay_goes_first_in_order_of_arrival_and_gives_up() -> None:
    h = Harness(max_batch=2, max_resident=2, max_retries=1)
    h.add("a", "b", "c", steps=3)
    first = h.scheduler.schedule()
    events = h.scheduler.restart(["b", "a", "c", "unknown"])
    assert events == [Restarted(request_id="a", attempt=1), Restarted(request_id="b", attempt=1)]
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (0, 3)
    assert h.answer(first) == [], "late answers of the first attempt"
    h.scheduler.finish_requests(["b", "c"], ENOUGH)
    second = h.scheduler.schedule()
    assert names(second) == ["a"]
    assert [new.request.request_id for new in second.scheduled_new_reqs] == ["a"], "with its payload"
    assert not set(first.run_ids) & set(second.run_ids)
    (failed,) = h.scheduler.restart(why="worker 0 died")
    assert isinstance(failed, Failed)
    assert "max_retries=1" in str(failed.error)
    assert "worker 0 died" in str(failed.error)
    assert not h.scheduler.has_work, "a dead worker holds nothing"


def test_who_joins_a_tick_that_is_sent_ahead_waits_for_the_end_of_the_one_before() -> None:
    h = Harness()
    h.add("a", steps=9)
    first = h.scheduler.schedule()
    h.add("b", steps=1)
    second = h.scheduler.schedule()
    assert names(second) == ["a", "b"]
    h.now = 3.0
    h.answer(first)
    h.now = 5.0
    outcome = h.answer(second)[-1]
    assert isinstance(outcome, Finished)
    assert (outcome.output.timings.queued_s, outcome.output.timings.total_s) == (3.0, 5.0)


def test_replay_measures_afresh_but_waits_on() -> None:
    h = Harness()
    h.add("a", steps=2)
    h.now = 1.0
    h.tick(denoise_s=5.0, batch_requests=8)
    h.scheduler.restart()
    h.now = 3.0
    h.tick(denoise_s=1.0)
    outcome = h.tick(denoise_s=1.0)[1][-1]
    assert isinstance(outcome, Finished)
    timings = outcome.output.timings
    assert (timings.queued_s, timings.denoise_s, timings.steps, timings.mean_batch_requests) == (1.0, 2.0, 2, 1.0)


def test_request_that_the_worker_lost_is_replayed() -> None:
    h = Harness()
    h.add("a", "b", steps=5)
    lost = h.scheduler.schedule()
    events = h.answer(lost, without=("a",))
    assert events == [StepEvent(request_id="b", step=1, batch_requests=1), Restarted(request_id="a", attempt=1)]
    output = h.scheduler.schedule()
    assert sorted(request_id_of(run) for run in output.run_ids) == ["a", "b"]


@pytest.mark.parametrize("how", ["restart", "recall"])
def test_who_is_replayed_goes_first_whatever_the_policy_and_the_dead_are_told_nothing(how: str) -> None:
    h = Harness(max_batch=2, max_resident=2, policy="srpt")
    h.add("long", "aborted", steps=30, num_inference_steps=30)
    h.tick()
    h.scheduler.schedule()
    h.add("short", "shorter", num_inference_steps=2)
    h.scheduler.finish_requests(["aborted"], ENOUGH)
    getattr(h.scheduler, how)()
    assert h.scheduler.amend() is None, "of the ticks that were under way none is"
    output = h.scheduler.schedule()
    assert (names(output), output.finished_req_ids) == (["long", "short"], [])


def test_what_was_held_against_a_request_that_failed_is_not_held_against_another_of_its_id() -> None:
    h = Harness(max_retries=1)
    for _ in range(2):
        h.add("a")
        h.scheduler.schedule()
        assert isinstance(h.scheduler.restart()[0], Restarted)
        h.scheduler.schedule()
        assert isinstance(h.scheduler.restart()[0], Failed)


def test_who_is_lost_again_and_again_by_a_worker_that_lives_fails() -> None:
    h = Harness(max_retries=2)
    h.add("a", "b", steps=9)
    events = [h.tick(without=("a",))[1][-1] for _ in range(3)]
    assert [type(event) for event in events] == [Restarted, Restarted, Failed]
    assert "gave up after 3 attempts" in str(events[-1].error)
    assert "its worker lost it (3 times)" in str(events[-1].error)
    assert names(h.scheduler.schedule()) == ["b"]


def test_who_is_replayed_in_a_tick_that_is_sent_ahead_has_waited_as_long_as_at_first() -> None:
    h = Harness()
    h.add("a", steps=1)
    h.add("b", steps=1, height=64)
    h.now = 2.0
    for _ in range(2):
        h.scheduler.schedule()
    h.scheduler.restart()
    first, second = (h.scheduler.schedule() for _ in range(2))
    assert (len(first.scheduled_new_reqs), len(second.scheduled_new_reqs)) == (1, 1)
    h.now = 7.0
    h.answer(first)
    outcome = h.answer(second)[-1]
    assert isinstance(outcome, Finished)
    assert outcome.output.timings.queued_s == 2.0


def test_who_was_aborted_is_not_added_to_the_tick_of_its_group() -> None:
    h = Harness(max_batch=2, max_resident=2, policy="deadline")
    h.add("a", "b", "c", num_inference_steps=1)
    assert len(h.scheduler.schedule().scheduled_new_reqs) == 2
    h.scheduler.finish_requests(["b", "c"], ENOUGH)  # of the group only c waited
    amendment = h.scheduler.amend()
    assert amendment is not None
    assert amendment.scheduled_new_reqs == []
