"""generate, stream, abort, timeout, validation: against a fake worker whose ticks the test controls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, InProcessFake, fake_engine, settled

from steploom import (
    AsyncDiffusionEngine,
    ConfigError,
    DeadlineExceeded,
    DiffusionRequest,
    Finished,
    GenerationFailed,
    InvalidRequest,
    Queued,
    QueueFull,
    RequestCancelled,
    StepEvent,
)
from steploom.engine.checks.generators import Borrowed
from steploom.protocol import RunnerOutput, SchedulerOutput


async def test_generate_answers_with_output_seed_and_timings() -> None:
    async with fake_engine() as (engine, _):
        out = await engine.generate("a cat", seed=3, num_inference_steps=5)
    assert out.images == ["a cat"]
    assert out.seed == 3
    assert out.error is None
    assert out.timings.steps == 5
    assert out.timings.mean_batch_requests == 1.0


async def test_requests_that_run_at_once_share_ticks() -> None:
    outs = {}

    async def one(name: str, steps: int) -> None:
        outs[name] = await engine.generate(name, num_inference_steps=steps)

    async with fake_engine() as (engine, executor):
        executor.held = True
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(one, str(number), 6)
            await anyio.wait_all_tasks_blocked()
            executor.let_go()
        assert len(executor.log) <= 8
    assert all(out.images == [name] for name, out in outs.items())
    assert max(out.timings.mean_batch_requests for out in outs.values()) > 6


async def test_a_ready_request_is_taken_but_not_with_keywords() -> None:
    async with fake_engine() as (engine, _):
        request = DiffusionRequest("a cat", request_id="mine", num_inference_steps=2)
        assert (await engine.generate(request)).request_id == "mine"
        with pytest.raises(InvalidRequest, match="seed: a ready DiffusionRequest"):
            await engine.generate(request, seed=3)


async def test_a_stream_tells_the_whole_story() -> None:
    async with fake_engine(InProcessFake) as (engine, executor):
        executor.held = True
        async with engine.stream("a cat", num_inference_steps=4, latents_every=2, preview_every=4) as run:
            events = [await anext(run)]
            for _ in range(4):
                await executor.ticking()
                executor.release()
                events.append(await anext(run))
            events += [event async for event in run]
            out = await run.result()
    assert isinstance(events[0], Queued)
    assert events[0].position == 0
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert [event.latents for event in steps] == [None, "latents 2", None, "latents 4"]
    assert [event.preview for event in steps] == [None, None, None, "preview 4"]
    assert isinstance(events[-1], Finished)
    assert events[-1].output is out


async def test_a_slow_reader_delays_nobody() -> None:
    async with fake_engine() as (engine, _), engine.stream("slow", num_inference_steps=50) as run:
        assert (await engine.generate("other", num_inference_steps=60)).images == ["other"]
        events = [event async for event in run]
        assert [type(event) for event in events] == [Queued, StepEvent, Finished]
        assert events[1].step == 50


async def test_leaving_a_stream_early_frees_the_slot_by_the_next_step() -> None:
    async with fake_engine() as (engine, executor):
        executor.held = True
        async with engine.stream("a cat", num_inference_steps=1000) as run:
            await executor.ticking()
        executor.release(2)
        await settled(engine)
        assert [out.finished_req_ids for out in executor.log] == [[], executor.log[0].run_ids]
        with pytest.raises(RequestCancelled, match="left"):
            await run.result()


async def test_a_stream_is_entered_once() -> None:
    async with fake_engine() as (engine, _):
        run = engine.stream("a cat")
        with pytest.raises(RuntimeError, match="enter the stream first"):
            await run.result()
        async with run:
            await run.result()
        with pytest.raises(RuntimeError, match="entered before"):
            await run.__aenter__()


async def test_an_old_stream_does_not_abort_a_new_request_of_the_same_id() -> None:
    async with fake_engine() as (engine, executor):
        async with engine.stream("old", request_id="same") as old:
            await old.result()
            executor.held = True
            run = engine.stream("new", request_id="same")
            await run.__aenter__()
        executor.let_go()
        assert (await run.result()).images == ["new"]


async def test_abort_raises_in_the_waiter() -> None:
    async with fake_engine() as (engine, executor):
        executor.held = True
        async with engine.stream("a cat", num_inference_steps=1000) as run:
            await executor.ticking()
            assert await engine.abort(run.request_id) is True
            with pytest.raises(RequestCancelled, match="was aborted"):
                await run.result()
            assert await engine.abort(run.request_id) is False
        executor.let_go()


@pytest.mark.parametrize("given", [["a", "b"], None, 7])
async def test_abort_takes_one_id(given: Any) -> None:
    async with fake_engine() as (engine, _):
        with pytest.raises(InvalidRequest, match=r"^request_id=.*: must be one request's id; abort several one by one"):
            await engine.abort(given)


async def test_timeout_ends_the_request_wherever_it_is() -> None:
    async with fake_engine(max_batch=1, max_resident=1) as (engine, executor):
        executor.held = True
        async with (
            engine.stream("resident", timeout=0.01) as resident,
            engine.stream("waiting", timeout=0.01) as waiting,
        ):
            for run in (resident, waiting):
                with pytest.raises(DeadlineExceeded, match=r"timeout=0.01: .* not done in time") as caught:
                    await run.result()
                assert isinstance(caught.value, TimeoutError)
        executor.let_go()
        await settled(engine)
        assert (await engine.generate("next", timeout=60)).images == ["next"]


async def test_a_request_that_is_done_in_time_stops_its_timer() -> None:
    async with fake_engine() as (engine, _), engine.stream("a cat", timeout=60) as run:
        (timer,) = engine._core.live.timers.values()
        await run.result()
        assert timer.cancelled()


class NeverSuspends(FakeExecutor):
    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        return self.answer(output)


async def test_an_executor_that_never_suspends_does_not_keep_the_event_loop() -> None:
    async with fake_engine(NeverSuspends, max_steps=10**9) as (engine, _):
        with pytest.raises(DeadlineExceeded):
            await engine.generate("a cat", num_inference_steps=10**9, timeout=0.01)


async def test_queue_full_is_raised_at_once() -> None:
    async with fake_engine(max_batch=1, max_resident=1, max_waiting=2) as (engine, executor):
        executor.held = True
        async with engine.stream("resident") as run:
            await executor.ticking()
            async with engine.stream("first") as first, engine.stream("second") as second:
                assert [(await anext(waiting)).position for waiting in (first, second)] == [0, 1]
                with pytest.raises(QueueFull, match="max_waiting=2"):
                    await engine.generate("third")
                executor.held = False
                executor.release()
                await second.result()
            await run.result()


async def test_a_duplicate_id_is_refused_and_harms_nobody() -> None:
    async with fake_engine() as (engine, _), engine.stream("first", request_id="same") as first:
        with pytest.raises(InvalidRequest, match="request_id='same'"):
            await engine.generate("second", request_id="same")
        assert (await first.result()).images == ["first"]


async def test_the_pipelines_own_error_is_the_requests_alone() -> None:
    async with fake_engine() as (engine, _), engine.stream("good", num_inference_steps=30) as good:
        with pytest.raises(GenerationFailed, match="ValueError: bad luck") as caught:
            await engine.generate("bad", fail_at=2)
        assert "Traceback" in caught.value.remote_traceback
        assert (await good.result()).images == ["good"]


class CountingGenerator:
    """What the engine uses of a ``torch.Generator``, without torch."""

    def __init__(self, state: int = 0) -> None:
        self.state = state

    def clone_state(self) -> CountingGenerator:
        return CountingGenerator(self.state)

    def get_state(self) -> int:
        return self.state

    def set_state(self, state: int) -> None:
        self.state = state


class OfCuda(CountingGenerator):
    """Of a GPU, as far as can be seen."""

    device = SimpleNamespace(type="cuda")


@pytest.mark.parametrize(
    ("keywords", "field", "message"),
    [
        ({"num_inference_step": 3}, "num_inference_step", "did you mean num_inference_steps"),
        ({"seeds": 3}, "seeds", "did you mean seed"),
        ({"zzz": 3}, "zzz", "it takes cache, callback_on_step_end, deadline, draft_every, fail_at"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1001: at most 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps", "at least 1"),
        ({"num_inference_steps": True}, "num_inference_steps", "at least 1"),
        ({"width": 64.5}, "width", "width=64.5: must be an integer"),
        ({"height": "64"}, "height", "height='64': must be an integer"),
        ({"width": 100_000, "height": 100_000}, "width", "EngineConfig.max_pixels"),
        ({"width": 10**9}, "width", "EngineConfig.max_pixels"),
        ({"task": "inpainting"}, "task", r"EngineConfig\(task='inpainting'\)"),
        ({"timeout": -1}, "timeout", "greater than 0"),
        ({"seed": "x"}, "seed", "must be an integer"),
        ({"callback_on_step_end": print}, "callback_on_step_end", "inproc"),
        ({"image": object()}, "image", "inproc"),
        ({"seed": None, "generator": object()}, "generator", "generator=<object>: must be a torch.Generator"),
        ({"seed": None, "generator": [OfCuda()]}, "generator", "is one of 'cuda', and the model is on 'cpu'"),
    ],
)
async def test_what_is_wrong_is_refused_before_it_is_queued(keywords: dict, field: str, message: str) -> None:
    async with fake_engine() as (engine, executor):
        with pytest.raises(InvalidRequest, match=message) as caught:
            await engine.generate("a cat", **keywords)
        assert caught.value.field == field
        assert not executor.log


async def test_a_missing_required_argument_is_named() -> None:
    async with fake_engine() as (engine, _):
        with pytest.raises(InvalidRequest, match="prompt: FakePipeline requires it"):
            await engine.generate(num_inference_steps=3)


async def test_in_process_generators_and_callbacks_pass() -> None:
    async with fake_engine(InProcessFake) as (engine, _):
        out = await engine.generate("a cat", generator=CountingGenerator(), callback_on_step_end=print)
        assert out.seed is None


async def test_what_is_no_generator_is_refused() -> None:
    async with fake_engine(InProcessFake) as (engine, executor):
        with pytest.raises(InvalidRequest, match=r"generator=7: must be a torch.Generator"):
            await engine.generate("a cat", generator=7)
        with pytest.raises(InvalidRequest, match=r"generator=\[\]: is empty"):
            await engine.generate("a cat", generator=[])
        assert not executor.log


async def test_the_task_that_is_loaded_may_be_named() -> None:
    async with fake_engine(task="text-to-image") as (engine, _):
        assert (await engine.generate("a cat", task="text-to-image")).images == ["a cat"]


def test_settings_are_checked_when_the_engine_is_made() -> None:
    assert AsyncDiffusionEngine(distributed_executor_backend=FakeExecutor, max_batch=3).config.max_batch == 3
    with pytest.raises(ConfigError, match=r"max_bach: .* did you mean max_batch"):
        AsyncDiffusionEngine(max_bach=3)
    with pytest.raises(ConfigError, match="distributed_executor_backend"):
        AsyncDiffusionEngine(distributed_executor_backend="no.such.Class")
    with pytest.raises(ConfigError, match="from_pipeline"):
        AsyncDiffusionEngine.from_pipeline(object(), model="demo")


def test_a_request_that_begins_again_draws_from_where_it_was_accepted() -> None:
    import torch

    given = torch.Generator().manual_seed(3)
    torch.rand(5, generator=given)
    borrowed = Borrowed(DiffusionRequest("a", generator=given))
    given.manual_seed(4)
    own = borrowed.request.params["generator"]
    first = torch.rand(3, generator=own)
    borrowed.rewind()
    assert torch.equal(torch.rand(3, generator=own), first)


class Drawing(InProcessFake):
    """Draws a number in each step; the first attempt is lost after two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: dict[str, list[float]] = {}
        self.lost = False

    def answer(self, output: SchedulerOutput) -> RunnerOutput:
        import torch

        if not self.lost and any(len(numbers) == 2 for numbers in self.drawn.values()):
            self.lost = True
            self.resident.clear()
            return RunnerOutput(tick=output.tick)
        result = super().answer(output)
        for new in output.scheduled_new_reqs:
            self.generator = new.request.params["generator"]
        for run in output.run_ids:
            self.drawn.setdefault(run, []).append(torch.rand((), generator=self.generator).item())
        return result


async def test_a_lost_request_is_replayed_with_the_generator_that_it_was_accepted_with() -> None:
    import torch

    given = torch.Generator().manual_seed(3)
    async with fake_engine(Drawing) as (engine, executor):
        await engine.generate("a", generator=given, num_inference_steps=4)
    first, second = executor.drawn.values()
    assert (len(first), len(second)) == (2, 4)
    assert second[:2] == first
    alone = torch.Generator().manual_seed(3)
    assert second == [torch.rand((), generator=alone).item() for _ in range(4)]
    assert torch.equal(given.get_state(), alone.get_state()), "and is handed back advanced"
