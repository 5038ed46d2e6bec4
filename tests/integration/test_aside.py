"""Text encoders and VAEs beside the ticks: by events, whatever the time."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import tiny
from driving import Driver, alone, config, distance, request

from steploom.weave import hub
from steploom.worker.runner import Runner

TEXT = {"height": 32, "width": 32, "max_sequence_length": 16}
TIMEOUT_S = 60.0


class Gate:
    """Holds up whoever calls a module: ``entered`` when somebody does, until ``opened``."""

    def __init__(self, module: Any) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.threads: list[str] = []
        self.passed = 0
        self.fault: Exception | None = None
        module.register_forward_pre_hook(self._arrive)
        module.register_forward_hook(self._leave)

    def _arrive(self, *_: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)
        if self.fault is not None:
            raise self.fault

    def _leave(self, *_: Any) -> None:
        self.passed += 1


class World:
    """A runner with one request that denoises, for long."""

    def __init__(self, aside: Any = "thread", **settings: Any) -> None:
        self.pipe = tiny.sd3()
        self.asked: dict[str, Any] = {}
        self.expected: dict[str, Any] = {}
        for name, kind in (("long", "latent"), ("text", "latent"), ("picture", "np")):
            self.asked[name] = request(name, f"a {name}", 3, kind, num_inference_steps=2, **TEXT)
            self.expected[name] = alone(self.pipe, self.asked[name])
        self.asked["long"] = request("long", "a long", 3, num_inference_steps=1000, **TEXT)
        self.runner = Runner.from_pipeline(self.pipe, config(aside=aside, **{"encode_cache_bytes": 0, **settings}))
        self.driver = Driver(self.runner)
        self.driver.drain([self.asked["text"], self.asked["picture"]])  # verification and probing
        self.driver.finished.clear()
        self.driver.tick([self.asked["long"]])

    def steps(self, name: str = "long") -> int:
        return self.driver.reports[name][-1].step

    def go_on(self, ticks: int = 5) -> None:
        """Ticks, each of which must be a step of the long request."""
        for _ in range(ticks):
            before = self.steps()
            self.driver.tick()
            assert self.steps() == before + 1

    def until(self, name: str, gate: Gate) -> None:
        """Ticks until ``gate`` holds up a request, which takes no rows from then on."""
        self.driver.tick([self.asked[name]])
        while not gate.entered.is_set():
            self.driver.tick()
        self.driver.tick()
        assert self.driver.reports[name][-1].aside
        assert gate.threads == ["steploom-aside"]

    def ends(self, name: str) -> None:
        while name not in self.driver.finished:
            self.driver.tick()
        report = self.driver.finished[name]
        assert report.error is None, report.error
        assert distance(report.output, self.expected[name]) <= 1e-4


@pytest.fixture
def world() -> Any:
    made = World()
    yield made
    made.runner.close()


def test_steps_go_on_while_a_prompt_is_encoded(world: World) -> None:
    gate = Gate(world.pipe.text_encoder)
    world.until("text", gate)
    world.go_on()
    report = world.driver.reports["text"][-1]
    assert (report.phase, report.aside, report.step, report.batch_requests) == ("encode", True, 0, 0)
    gate.opened.set()
    world.ends("text")


def test_steps_go_on_while_a_picture_is_decoded(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    world.go_on()
    report = world.driver.reports["picture"][-1]
    assert (report.phase, report.aside, report.step) == ("decode", True, 2)
    gate.opened.set()
    world.ends("picture")
    timed = world.driver.reports["picture"]
    assert sum(report.decode_s for report in timed) > 0
    assert all(report.batch_requests == 1 for report in world.driver.reports["long"][-5:])


def test_a_cancel_while_a_picture_is_decoded_frees_everything(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    program = weakref.ref(world.runner._residents["picture"].program)
    world.driver.cancel("picture")
    world.go_on()
    assert world.runner.stats().resident == 1
    assert program().frame is not None, "what runs is not torn down"
    gate.opened.set()
    world.runner._hub.aside.settle()
    world.go_on(1)
    gc.collect()
    assert program() is None
    assert not world.runner._leaving
    assert "picture" not in world.driver.finished


def test_what_was_not_begun_is_not_begun_after_a_cancel(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    other = Gate(world.pipe.text_encoder)
    world.driver.tick([world.asked["text"]])
    world.driver.cancel("text")
    world.go_on()
    gate.opened.set()
    world.ends("picture")
    assert not other.entered.is_set()


@pytest.mark.parametrize("how", ["close", "call"])
def test_closing_and_calls_wait_for_what_is_under_way(world: World, how: str) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    aside = world.runner._hub.aside
    settle = aside.settle

    def settling() -> None:
        assert gate.opened.is_set() or not gate.passed
        gate.opened.set()
        settle()

    aside.settle = settling
    if how == "close":
        world.runner.close()
        assert not any(thread.name == "steploom-aside" for thread in threading.enumerate())
    else:
        with pytest.raises(Exception, match="resident"):
            world.runner.call("sleep", (), {})
        world.ends("picture")
    assert gate.passed == 1


def test_a_fault_is_its_own_request_s(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    gate.fault = RuntimeError("no such colour")
    gate.opened.set()
    world.driver.tick([world.asked["picture"]])
    while "picture" not in world.driver.finished:
        world.go_on(1)
    error = world.driver.finished["picture"].error
    assert error is not None
    assert "no such colour" in error.message
    world.go_on()


def test_the_same_text_is_encoded_once_though_nobody_has_it_yet() -> None:
    world = World(encode_cache_bytes=2**20)
    gate = Gate(world.pipe.text_encoder)
    new = [request(name, "a cat", 1, guidance_scale=1.0, num_inference_steps=2, **TEXT) for name in "ab"]
    for one in new:
        world.driver.tick([one])
    gate.opened.set()
    while not {"a", "b"} <= world.driver.finished.keys():
        world.driver.tick()
    assert {world.driver.finished[name].error for name in "ab"} == {None}
    assert gate.passed == 1
    world.runner.close()


def test_without_it_everything_runs_in_the_ticks() -> None:
    world = World("off")
    gates = [Gate(world.pipe.vae.decoder), Gate(world.pipe.text_encoder)]
    for gate in gates:
        gate.opened.set()
    world.driver.tick([world.asked["picture"]])
    assert world.driver.reports["picture"][-1].step == 1
    world.driver.tick()
    assert world.driver.finished.keys() == {"picture"}
    assert {name for gate in gates for name in gate.threads} == {threading.current_thread().name}
    world.runner.close()


def test_alone_it_runs_at_once() -> None:
    """Nobody's steps wait for it."""
    before = set(threading.enumerate())
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config(aside="thread")))
    driver.drain([request("a", "a cat", 1, "np", num_inference_steps=2, **TEXT)])
    assert driver.ticks == 2
    assert set(threading.enumerate()) <= before


def test_a_tick_waits_where_nothing_else_can_run(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    world.driver.cancel("long")
    before = world.driver.ticks
    threading.Timer(0.05, gate.opened.set).start()
    world.ends("picture")
    assert world.driver.ticks == before + 1


@pytest.mark.slow
def test_in_slices_a_decode_takes_several_ticks_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FEW", 0)
    monkeypatch.setattr(hub, "SHARE", 1e-3)
    world = World("slices")
    world.driver.tick([world.asked["picture"]])
    ticks = 0
    while "picture" not in world.driver.finished:
        world.go_on(1)
        ticks += world.driver.reports["picture"][-1].phase == "decode"
    assert ticks > 1
    assert world.driver.finished["picture"].error is None
    assert distance(world.driver.finished["picture"].output, world.expected["picture"]) <= 1e-4
    world.runner.close()


@pytest.mark.parametrize("mode", ["thread", "slices"])
def test_many_that_join_and_finish_get_what_they_would_get_alone(mode: str) -> None:
    pipe = tiny.sd3()
    asked = [
        request(str(i), f"a {i}", i, "np" if i % 2 else "latent", num_inference_steps=2 + i % 3, **TEXT)
        for i in range(7)
    ]
    expected = {one.request_id: alone(pipe, one) for one in asked}
    driver = Driver(Runner.from_pipeline(pipe, config(aside=mode)))
    finished = driver.drain(asked, joining=1)
    for name, output in expected.items():
        assert finished[name].error is None
        assert distance(finished[name].output, output) <= 1e-4
    driver.runner.close()


def test_who_returns_finds_a_place_or_waits_for_one() -> None:
    world = World(max_batch=2)
    gate = Gate(world.pipe.text_encoder)
    gate.opened.set()
    driver = world.driver
    driver.tick([request(name, f"a {name}", 1, num_inference_steps=3, **TEXT) for name in "abc"])
    shared: list[int] = []
    while not {"a", "b", "c"} <= driver.finished.keys():
        room = max(2, sum(not driver.reports[name][-1].aside for name in driver.running))
        shared.append(sum(report.batch_requests > 0 for report in driver.tick().reports))
        assert shared[-1] <= room
    assert max(shared) > 1
    world.runner.close()


def test_sleep_after_a_cancel_waits_for_what_runs(world: World) -> None:
    gate = Gate(world.pipe.vae.decoder)
    world.until("picture", gate)
    threading.Timer(0.05, gate.opened.set).start()
    world.driver.cancel("picture")
    world.driver.cancel("long")
    world.driver.tick()
    assert gate.passed == 1
    assert world.runner.stats().resident == 0
    world.runner.call("sleep", (), {})
    world.runner.call("wake_up", (), {})
    world.driver.tick([world.asked["picture"]])
    world.ends("picture")
