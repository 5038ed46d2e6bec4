"""Who shares a tick: batch keys, rotation, capacity, order."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sched_harness import Harness, names

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.requests import DiffusionRequest
from steploom.sched import Fcfs, Policy, RequestScheduler, SchedulerInterface, StepScheduler, build_scheduler
from steploom.sched.state import guess_key

EIGHT = [f"small{i}" for i in range(8)]


def test_requests_join_and_leave_between_steps() -> None:
    h = Harness(max_batch=3)
    h.add("a", steps=2)
    assert h.tick()[0] == ["a"]
    h.add("b", "c", "d", steps=2)
    assert h.tick()[0] == ["a", "b", "c"]
    assert h.tick()[0] == ["b", "c", "d"]
    assert h.tick()[0] == ["d"]
    assert not h.scheduler.has_work


def test_drain_bubble() -> None:
    """vLLM-Omni drained the batch to one 768x768 request while eight of 512x512 waited behind it."""
    h = Harness(max_batch=8)
    h.add("large", height=768, steps=20)
    h.add(*EIGHT, height=512, steps=20)
    ticks = [h.tick()[0] for _ in range(6)]
    assert ticks == [["large"], EIGHT] * 3


def test_full_batch_is_not_drained_for_another_shape() -> None:
    h = Harness(max_batch=8, max_resident=9)
    h.add(*EIGHT, height=512, steps=20)
    h.tick()
    h.add("large", height=768, steps=3)
    assert [h.tick()[0] for _ in range(4)] == [EIGHT, ["large"]] * 2


def test_shape_without_a_place_keeps_its_turn() -> None:
    """The first free place goes to the shape that was passed over, not to the next request of the shape that runs."""
    h = Harness(max_batch=2, max_resident=2)
    h.add("a", steps=3)
    h.add("b", "c", steps=9)
    h.tick()
    h.add("large", height=768, steps=2)
    assert [h.tick()[0] for _ in range(2)] == [["a", "b"]] * 2
    assert h.tick()[0] == ["large"]
    assert h.tick()[0] == ["b"]


def test_batch_keys_take_turns() -> None:
    h = Harness()
    for height in (256, 512, 768):
        h.add(f"a{height}", f"b{height}", height=height, steps=9)
    turns = [h.tick()[0] for _ in range(6)]
    assert turns == [["a256", "b256"], ["a512", "b512"], ["a768", "b768"]] * 2


def test_guesses_with_the_same_observed_key_share_a_tick() -> None:
    h = Harness()
    h.keys = {"a": "one", "b": "one", "c": "one"}
    h.add("a", height=512, steps=9)
    h.add("b", height=None, steps=9)  # The default size, which only the worker knows.
    assert [h.tick()[0] for _ in range(3)] == [["a"], ["b"], ["a", "b"]]
    h.add("c", height=None, steps=9)
    assert h.tick()[0] == ["a", "b", "c"], "the guess is linked to the key now"


def test_request_whose_observed_key_changes_moves() -> None:
    h = Harness()
    h.add("a", "b", steps=9)
    h.tick()
    h.keys["a"] = "late layer"
    assert h.tick()[0] == ["a", "b"]
    h.tick(), h.tick()
    assert sorted([h.tick()[0], h.tick()[0]]) == [["a"], ["b"]]


def test_any_text_is_a_batch_key() -> None:
    """A custom executor may report what it likes."""
    h = Harness()
    h.keys = {"a": "", "b": "?", "c": "?||height=3"}
    for height, name in enumerate("abc", start=1):
        h.add(name, height=height, steps=3)
    assert h.drain() == 9


def test_encoding_request_stays_with_its_guess() -> None:
    """A tick that only encodes reports no key; what a mate reports is the best guess for it."""
    h = Harness()
    h.add("a", "b", steps=9)
    output = h.scheduler.schedule()
    h.keys["a"] = "seen"
    h.keys["b"] = None  # type: ignore[assignment]
    h.answer(output)
    output = h.scheduler.schedule()
    assert (names(output), output.batch_key) == (["a", "b"], "seen")


def test_more_residents_of_a_key_than_a_batch_takes_run_oldest_first() -> None:
    h = Harness(max_batch=2, max_resident=4)
    h.add("a", "b", height=512, steps=3)
    h.add("c", "d", height=768, steps=3)
    h.keys = dict.fromkeys("abcd", "one")
    assert [h.tick()[0] for _ in range(2)] == [["a", "b"], ["c", "d"]]
    assert [h.tick()[0] for _ in range(4)] == [["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]


def test_lower_priority_runs_first_within_a_key() -> None:
    h = Harness(max_batch=1, max_resident=1)
    h.add("late", priority=5, steps=1)
    h.add("first", "second", steps=1)
    h.add("urgent", priority=-1, steps=1)
    assert [h.tick()[0] for _ in range(4)] == [["urgent"], ["first"], ["second"], ["late"]]


def test_arrival_decides_between_guesses_of_one_key() -> None:
    h = Harness(max_batch=1, max_resident=1)
    h.keys = dict.fromkeys(["x", "y", "a", "b", "c"], "one")
    h.add("x", height=1, steps=1)
    h.add("y", height=2, steps=1)
    h.drain()
    h.add("a", height=2, steps=1)
    h.add("b", height=1, steps=1)
    h.add("c", height=2, steps=1)
    assert [h.tick()[0] for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_links_from_guesses_to_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steploom.sched.groups.MAX_LINKS", 3)
    h = Harness()
    for height in range(10):
        h.add(f"r{height}", height=height)
    h.drain()
    policy = h.scheduler.policy  # type: ignore[attr-defined]
    groups = policy._groups
    assert len(groups._links) == 3
    books = (groups.active, groups.pending, groups.home, policy._crowds)
    assert not any(books), "everything else is empty when nothing is left"


def test_request_scheduler_runs_one_to_completion() -> None:
    h = Harness(scheduler="request", max_batch=8)
    h.add("a", "b", steps=2)
    h.add("large", height=768, steps=2)
    assert [h.tick()[0] for _ in range(6)] == [["a"], ["a"], ["large"], ["large"], ["b"], ["b"]]


class Sized:
    """Stands for a tensor, an array or an image."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"height": 512}, {"height": 768}),
        ({"num_frames": 16}, {"num_frames": 24}),
        ({"task": "text-to-image"}, {"task": "image-to-image"}),
        ({"image": Sized(size=(64, 64))}, {"image": Sized(size=(64, 96))}),
        ({"image": [Sized(size=(64, 64))]}, {"image": [Sized(size=(64, 96))]}),
        ({"prompt_embeds": Sized(shape=(1, 7, 8))}, {"prompt_embeds": Sized(shape=(1, 9, 8))}),
    ],
)
def test_guess_tells_apart(one: dict[str, object], other: dict[str, object]) -> None:
    assert guess_key(DiffusionRequest("p", **one)) != guess_key(DiffusionRequest("p", **other))  # type: ignore[arg-type]


def test_guess_ignores_what_can_share_a_forward() -> None:
    one = DiffusionRequest("p", seed=1, height=64, width=32, guidance_scale=1.0, num_inference_steps=5, lora="a")
    other = DiffusionRequest(
        "q", seed=2, width=32, height=64, guidance_scale=7.0, num_inference_steps=50, image=[], negative_prompt="r"
    )
    assert guess_key(one) == guess_key(other)


def test_guess_ignores_sizes_of_images_that_are_resized() -> None:
    def guess(image: object, **sizes: object) -> str:
        return guess_key(DiffusionRequest("p", seed=1, image=image, **sizes))

    small, large = Sized(size=(64, 64)), Sized(size=(64, 96))
    assert guess(small, height=64, width=64) == guess([large], height=64, width=64)
    assert guess(small, height=64) != guess(large, height=64), "the width is the image's"
    assert guess(small, height=64, width=None) != guess(large, height=64, width=None)
    array, wider = Sized(shape=(1, 3, 8, 8)), Sized(shape=(1, 3, 8, 9))
    assert guess(array, height=64, width=64) != guess(wider, height=64, width=64)


class Custom(StepScheduler):
    """A scheduler of the user's."""


class CustomPolicy(Fcfs):
    """A policy of the user's."""


def test_names_and_classes_are_resolved() -> None:
    def kind(**config: object) -> type[SchedulerInterface]:
        return type(build_scheduler(EngineConfig(**config)))  # type: ignore[arg-type]

    assert kind() is StepScheduler
    assert kind(scheduler="request") is RequestScheduler
    assert kind(scheduler=Custom) is Custom
    assert kind(scheduler=f"{__name__}.Custom") is Custom
    scheduler = build_scheduler(EngineConfig(policy=f"{__name__}.CustomPolicy"))
    assert type(scheduler.policy) is CustomPolicy  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scheduler": "fifo"}, "scheduler='fifo'.*step, request"),
        ({"scheduler": "no.such.Class"}, "scheduler='no.such.Class'"),
        ({"policy": "steploom.sched.NoSuch"}, "policy='steploom.sched.NoSuch'.*fcfs"),
        ({"policy": Custom}, "must be a subclass of .*Policy"),
    ],
)
def test_unknown_names_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scheduler(EngineConfig(**config))  # type: ignore[arg-type]


def test_policy_and_clock_are_injected() -> None:
    def clock() -> float:
        return 5.0

    seen: list[tuple[EngineConfig, object]] = []

    class Spy(Fcfs):
        def __init__(self, config: EngineConfig, clock: object) -> None:
            seen.append((config, clock))
            super().__init__(config, clock)  # type: ignore[arg-type]

    config = EngineConfig(policy=Spy)
    build_scheduler(config, clock)
    assert seen == [(config, clock)]
    assert issubclass(Spy, Policy)


def test_scheduler_imports_neither_torch_nor_an_event_loop() -> None:
    code = (
        "import sys, steploom.sched; print(sorted({'torch', 'asyncio', 'anyio', 'zmq', 'greenlet'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
