"""The thread beside the ticks: faults of a device, calls that are late, what is recorded on its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_weave_aside import TIMEOUT_S, Answers, entry

from steploom.weave import untyped
from steploom.weave.aside.aside import SideThread, _tensors


def test_a_fault_of_the_device_ends_no_thread_and_is_raised_on_the_hub_s() -> None:
    class Broken:
        """A stream whose work turns out to have failed when it is waited for."""

        def mark(self) -> None: ...

        @contextlib.contextmanager
        def entered(self, marks: Any, given: Any) -> Iterator[None]:
            yield
            raise RuntimeError("device-side assert triggered")

        def taken_back(self, found: Any) -> None: ...

    aside = SideThread(Answers(1), Broken())  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        aside.send([entry()])
        with aside._news:
            assert aside._news.wait_for(lambda: not aside.working, TIMEOUT_S), "it hangs"
        with pytest.raises(RuntimeError, match="device-side assert"):
            aside.take()
    aside.close()


def test_a_call_that_nobody_knows_or_that_is_late_may_take_as_long_again() -> None:
    answers = Answers()
    aside = SideThread(answers)
    aside.send([entry()])
    assert answers.entered.wait(TIMEOUT_S)
    aside._began -= 100.0
    assert aside._remaining_s() >= 100.0
    aside._took["vae", "decode"] = 150.0
    assert 40.0 < aside._remaining_s() <= 50.0
    answers.may.set()
    aside.close()


def test_what_a_distribution_holds_is_found() -> None:
    rows = untyped.GaussianRows(torch.ones(1, 8, 2, 2))
    found = _tensors([SimpleNamespace(latent_dist=rows), {"x": (torch.ones(3),)}])
    assert {id(rows.parameters), id(rows.mean), id(rows.std)} <= set(map(id, found))
    assert any(tensor.shape == (3,) for tensor in found)
