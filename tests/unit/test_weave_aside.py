"""What runs beside the ticks: a thread, slices, a stream, without a model or a device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from steploom.weave.aside.aside import Aside, SideThread
from steploom.weave.aside.slices import Slices
from steploom.weave.aside.streams import SideStream
from steploom.weave.batching.batches import Group
from steploom.weave.calls import ModuleCall
from steploom.weave.modules.shared import Target
from steploom.worker import beside

TIMEOUT_S = 30.0


class Asker:
    """As much of a program as is needed."""

    def __init__(self) -> None:
        self.aside = self.answered = False
        self.answer: Any = None


def entry(name: str = "vae", module: nn.Module | None = None) -> Any:
    return Asker(), ModuleCall(Target(name, "decode", module or Decoder(), (name,)), (torch.ones(2),), {})


class Decoder(nn.Module):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * 2


class Answers:
    """Answers calls when it may; notes which ran together, and on which thread."""

    def __init__(self, operations: int = 0) -> None:
        self.groups: list[list[str]] = []
        self.threads: set[str] = set()
        self.entered, self.may = threading.Event(), threading.Event()
        self.torch_threads = 0
        self.operations = operations
        self.grad = False

    def __call__(self, group: Group) -> None:
        self.entered.set()
        assert self.operations or self.may.wait(TIMEOUT_S)
        self.groups.append([call.target.name for _, call in group])
        self.threads.add(threading.current_thread().name)
        self.torch_threads = torch.get_num_threads()
        self.grad = self.grad or torch.is_grad_enabled()
        x = torch.zeros(())
        for _ in range(self.operations):
            x = x + 1
        for program, call in group:
            program.answer = call.run() + x


def test_calls_of_one_module_that_wait_together_run_together() -> None:
    answers = Answers()
    aside = SideThread(answers)
    first, late = entry(), [entry("text_encoder"), entry(), entry("text_encoder")]
    aside.send([first])
    assert answers.entered.wait(TIMEOUT_S)
    for one in late:
        aside.send([one])
    assert all(program.aside and not program.answered for program, _ in (first, *late))
    answers.may.set()
    aside.settle()
    assert answers.groups == [["vae"], ["text_encoder", "text_encoder"], ["vae"]]
    assert answers.threads == {"steploom-aside"}
    assert not answers.grad
    aside.take()
    assert all(program.answered and program.answer is not None for program, _ in (first, *late))
    aside.close()
    assert not any(thread.name == "steploom-aside" for thread in threading.enumerate())


def test_what_has_not_begun_is_dropped_and_what_has_goes_on() -> None:
    answers = Answers()
    aside = SideThread(answers)
    (one, _), (other, _) = runs, waits = entry(), entry("text_encoder")
    aside.send([runs])
    assert answers.entered.wait(TIMEOUT_S)
    aside.send([waits])
    for program in (one, other):
        aside.drop(program)
    assert (aside.runs(one), aside.runs(other)) == (True, False)
    answers.may.set()
    aside.settle()
    assert answers.groups == [["vae"]]
    assert not aside.runs(one)
    aside.close()


def test_the_tick_waits_only_for_what_is_likely_to_be_done_in_time() -> None:
    answers = Answers()
    aside = SideThread(answers)
    aside._took["vae", "decode"] = 100.0
    aside.send([entry()])
    assert not aside.spend(0.5), "and that at once"
    answers.may.set()
    assert aside.spend(math.inf)
    aside.close()


def test_the_thread_ends_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steploom.weave.aside.aside.LINGER_S", 0.01)
    answers = Answers(1)
    aside = SideThread(answers)
    for _ in range(2):
        aside.send([entry()])
        thread = aside._thread
        aside.settle()
        if thread is not None:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
    assert len(answers.groups) == 2


@pytest.mark.parametrize("kind", [SideThread, Slices])
def test_what_should_not_happen_is_raised_on_the_hub_s_thread(kind: type[Aside]) -> None:
    def answer(group: Group) -> None:
        raise MemoryError("no more")

    aside = kind(answer)
    aside.send([entry()])
    aside.settle()
    with pytest.raises(MemoryError, match="no more"):
        aside.take()
    assert not aside.busy
    aside.close()


def test_slices_stop_between_two_operations_and_go_on() -> None:
    answers = Answers(500)
    aside = Slices(answers)
    one, other = entry(), entry("text_encoder")
    aside.send([one])
    aside.send([other])
    turns = 0
    while not aside.spend(1e-5):
        turns += 1
        assert aside.runs(one[0])
        assert torch.ones(2).add(1).sum() == 4, "nobody else is stopped"
    assert turns > 1
    assert (one[0].answer == 502).all()
    aside.take()
    assert one[0].answered
    assert not other[0].answered
    with torch.enable_grad(), torch.autocast("cpu"):
        aside.settle()
    assert (other[0].answer == 502).all()
    assert not answers.grad


def test_slices_do_not_stop_where_others_would_see_what_a_module_switched_on() -> None:
    stops: list[bool] = []

    def answer(group: Group) -> None:
        with torch.autocast("cpu"):
            stops.append(torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype is torch.bfloat16)
            for _ in range(100):
                torch.ones(1) + 1
        stops.append(False)

    aside = Slices(answer)
    aside.send([entry()])
    aside.spend(1e-9)
    while not aside.spend(1e-9):
        assert not torch.is_autocast_enabled("cpu")
    assert stops == [True, False]


@pytest.mark.parametrize(
    ("mode", "device", "own", "there", "kind", "threads"),
    [("auto", "cpu", 1, 2, SideThread, None), ("auto", "cpu", 2, 2, Slices, None), ("auto", "cpu", 3, 4, SideThread, 1),
     ("thread", "cpu", 2, 2, SideThread, 1), ("slices", "cpu", 1, 2, Slices, None), ("off", "cpu", 1, 2, Aside, None),
     ("auto", "mps", 1, 2, Aside, None)],
)  # fmt: skip
def test_the_way_by_setting_and_machine(
    monkeypatch: pytest.MonkeyPatch, mode: Any, device: str, own: int, there: int, kind: type, threads: int | None
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    monkeypatch.setattr(beside, "cores", lambda: there)
    made = beside.make_aside(mode, torch.device(device), lambda group: None)
    assert type(made) is kind
    assert getattr(made, "_threads", None) == threads


def test_the_thread_s_number_of_torch_threads_is_its_own() -> None:
    before = torch.get_num_threads()
    answers = Answers(1)
    aside = SideThread(answers, threads=before + 1)
    aside.send([entry()])
    aside.settle()
    assert answers.torch_threads == before + 1
    assert torch.get_num_threads() == before
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [before]
    aside.close()


def test_modules_that_stay_on_their_thread() -> None:
    aside = Slices(lambda group: None)

    def leaves(module: nn.Module) -> bool:
        return aside.takes(ModuleCall(Target("vae", "forward", module, ()), (), {}))

    plain = nn.Sequential(nn.Linear(1, 1))
    assert leaves(plain)
    assert not Aside(lambda group: None).takes(entry()[1])
    plain[0]._hf_hook = object()  # as accelerate's offloading leaves it
    assert not leaves(plain)
    grouped = nn.Sequential(nn.Linear(1, 1))
    grouped[0].__dict__["_diffusers_hook"] = object()
    assert not leaves(grouped)
    assert not leaves(torch.compile(nn.Linear(1, 1)))  # type: ignore[arg-type]


class Cuda:
    """``torch.cuda`` in words."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.inside: str | None = None

    def Stream(self, device: Any) -> Any:
        return _Stream(self, "side")

    def Event(self, *, blocking: bool = False) -> Any:
        return _Event(self, "done" if blocking else "handed")

    def current_stream(self, device: Any) -> Any:
        return _Stream(self, self.inside or "main")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.inside = stream.name
        try:
            yield
        finally:
            self.inside = None


class _Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Any) -> None:
        self.cuda.said.append(f"{self.name} waits for {event.name}")


class _Event:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record(self, stream: _Stream) -> None:
        self.cuda.said.append(f"{self.name} on {stream.name}")

    def synchronize(self) -> None:
        self.cuda.said.append(f"until {self.name}")


class _Tensor:
    is_cuda = True

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record_stream(self, stream: _Stream) -> None:
        self.cuda.said.append(f"used on {stream.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_what_crosses_streams_is_told_so(fails: bool) -> None:
    cuda: Any = Cuda()
    side = SideStream(torch.device("cuda", 0), cuda)
    tensor: Any = _Tensor(cuda)
    handed = side.mark()
    with contextlib.suppress(ZeroDivisionError), side.entered([handed], [tensor, torch.ones(1)]):
        cuda.said.append(f"runs on {cuda.inside}")
        if fails:
            raise ZeroDivisionError
    side.taken_back([tensor, torch.ones(1)])
    assert cuda.said == [
        "handed on main", "side waits for handed", "used on side", "runs on side", "done on side", "until done",
        "used on main",
    ]  # fmt: skip


def test_on_cuda_the_thread_works_on_the_stream() -> None:
    cuda: Any = Cuda()
    answers = Answers(1)
    aside = SideThread(answers, SideStream(torch.device("cuda", 0), cuda))
    aside.send([entry()])
    aside.settle()
    aside.take()
    assert cuda.said == ["handed on main", "side waits for handed", "done on side", "until done"]
    aside.close()
