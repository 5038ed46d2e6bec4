"""Out of memory in a merged forward: it is bisected, nobody fails, and the next batches are smaller."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request

from steploom import AsyncDiffusionEngine
from steploom.weave.batching import room
from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 12, "max_sequence_length": 16}
ROOM = 8
"""Rows that the pretended device has memory for: four guided requests."""


@pytest.mark.asyncio
async def test_nobody_fails_and_the_batch_shrinks_until_it_fits() -> None:
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, **SMALL) for n in range(6)]
    expected = [alone(pipe, one) for one in asked]
    rows: list[int] = []

    def tight(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["hidden_states"]))
        if rows[-1] > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    async with AsyncDiffusionEngine.from_pipeline(pipe, max_batch=6) as engine:
        warm = [request(f"w{n}", "a dog", n, **SMALL) for n in range(2)]
        await together(engine, warm)
        pipe.transformer.register_forward_pre_hook(tight, with_kwargs=True)
        found = await together(engine, asked)
        assert max(rows) > ROOM, "it was tried"
        await together(engine, [request(f"s{n}", f"a bird {n}", n, **SMALL) for n in range(6)])
        late = rows[len(rows) // 2 :]
        assert sum(count > ROOM for count in late) < len(late) / 4, "and not tried again and again"
    for result, wanted in zip(found, expected, strict=True):
        assert distance(result.output, wanted) <= 1e-4


FAULTS = {
    "torch's own": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
    "Python's": MemoryError,
    "CUDA's": lambda: RuntimeError("CUDA error: out of memory"),
    "cuBLAS's": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "the processor's": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
}
"""How a lack of memory is said."""


class Short:
    """A runner whose transformer has no memory for some forwards: those whose turn and rows ``lacks`` is true of.

    Attributes:
        rows: Of each forward.
        left: Whether what the one before held was there still, at each forward after one that failed.
    """

    def __init__(self, fault: Callable[[], Exception], lacks: Callable[[int, int], bool]) -> None:
        self.rows: list[int] = []
        self.left: list[bool] = []
        self._fault, self._lacks = fault, lacks
        self._held: weakref.ref[torch.Tensor] | None = None
        self.pipe = tiny.sd3()
        self.asked = [request(f"r{n}", f"a cat {n}", n, **SMALL) for n in range(4)]
        self.expected = [alone(self.pipe, one) for one in self.asked]
        self.pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        self.driver = Driver(Runner.from_pipeline(self.pipe, config(max_batch=4)))

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append(len(kwargs["hidden_states"]))
        if self._held is not None:
            self.left.append(self._held() is not None)
            self._held = None
        if self._lacks(len(self.rows), self.rows[-1]):
            activations = torch.zeros(1000)
            self._held = weakref.ref(activations)
            raise self._fault()

    def draw(self, failing: int = 0) -> list[int]:
        """Draws all pictures together, of which so many fail, and the others come out as they should.

        Returns:
            The rows without memory that each tick was told of.
        """
        told: list[int] = []
        queue = list(self.asked)
        while queue or self.driver.running:
            told.append(self.driver.tick(queue).too_many_rows)
            queue = []
        for one, wanted in zip(self.asked, self.expected, strict=True):
            report = self.driver.finished[one.request_id]
            failing -= report.error is not None
            assert report.error is not None or distance(report.output, wanted) <= 1e-4
        assert failing == 0
        return told

    def kinds(self) -> set[str]:
        """What was found out about merged calls of the transformer."""
        found = self.driver.runner.stats().kinds
        return {verdict for name, verdict in found.items() if name.startswith("transformer")}


@pytest.mark.parametrize("how", FAULTS)
def test_however_it_is_said_the_call_is_bisected_and_merged_again_later(how: str) -> None:
    short = Short(FAULTS[how], lambda turn, rows: rows == ROOM and turn < 40)
    assert ROOM in short.draw(), "the scheduler hears of it"
    assert short.kinds() == {"verified"}
    before = len(short.rows)
    short.draw()
    assert short.rows[before:].count(ROOM) >= 11, "all four share again"


@pytest.mark.parametrize("later", [1, 3], ids=["alone", "with other mates"])
def test_a_check_without_memory_finds_nothing_out(later: int) -> None:
    merged: list[int] = []

    def lacks(turn: int, rows: int) -> bool:
        """The first merged forward does well; one of those that check it does not."""
        if rows > 4 and not merged:  # learning the batch axes takes 4
            merged.extend((turn, rows))
        return bool(merged) and turn == merged[0] + later

    short = Short(FAULTS["CUDA's"], lacks)
    told = short.draw()
    assert [rows for rows in told if rows] == merged[1:], "the scheduler hears of it"
    assert short.kinds() == {"verified"}
    assert short.rows.count(ROOM) > 8, "all share from the next step on"


@pytest.mark.parametrize("most", [2, 4], ids=["single calls", "merged calls"])
def test_the_next_forward_has_the_memory_of_the_one_that_failed(most: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "steploom")  # what is logged is kept, and with it the faults
    short = Short(FAULTS["CUDA's"], lambda turn, rows: most < rows)
    short.draw()
    assert short.left
    assert not any(short.left)


def test_mates_have_the_memory_of_a_call_that_failed_by_itself() -> None:
    full: list[int] = []

    def lacks(turn: int, rows: int) -> bool:
        """Of four, there is no memory for all, nor for two of them, nor, twice, for one of these."""
        full.extend([turn] if rows == ROOM else [])
        return bool(full) and turn < full[0] + 4

    short = Short(FAULTS["CUDA's"], lacks)
    short.draw(failing=1)
    assert short.left == [False] * 4


@pytest.mark.parametrize("part", ["text_encoder", "vae.decoder"])
def test_encoders_and_vaes_are_not_tried_anew_with_rows_that_had_no_memory(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RECOVERS", 4)
    pipe = tiny.sd3()
    asked = [
        request(f"r{n}", f"a cat {n}", n, output_type="pt", **{**SMALL, "num_inference_steps": 1}) for n in range(4)
    ]
    expected = [alone(pipe, one) for one in asked]
    driver = Driver(Runner.from_pipeline(pipe, config(max_batch=4, encode_cache_bytes=0)))
    rows: list[int] = []

    def tight(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    driver.drain([one.with_id(f"warm{n}") for n, one in enumerate(asked)])
    _part(pipe, part).register_forward_pre_hook(tight, with_kwargs=True)
    failed: list[int] = []
    for n in range(8):
        rows.clear()
        driver.drain([one.with_id(f"{n}-{one.request_id}") for one in asked])
        failed.append(sum(count > 2 for count in rows))
    assert failed[0] > 0
    assert failed[1] == 0
    assert any(failed[2:]), "it recovers"
    assert failed.count(0) > 4, "and is tried less and less often"
    for one, wanted in zip(asked, expected, strict=True):
        assert distance(driver.finished[f"{n}-{one.request_id}"].output, wanted) <= 1e-4


@pytest.mark.parametrize("invariant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", [pytest.param("transformer", marks=pytest.mark.slow), "text_encoder", "vae.decoder"])
def test_a_call_by_itself_is_tried_again(part: str, invariant: bool) -> None:
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, output_type="pt", **SMALL) for n in range(3)]
    expected = [alone(pipe, one) for one in asked]
    driver = Driver(Runner.from_pipeline(pipe, config(max_batch=1, batch_invariant=invariant)))
    calls: list[Any] = []

    def lacks(module: Any, args: Any) -> None:
        """No memory at the first of four calls."""
        calls.append(module)
        if len(calls) % 4 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    _part(pipe, part).register_forward_pre_hook(lacks)
    driver.drain(asked)
    assert len(calls) >= 4
    for one, wanted in zip(asked, expected, strict=True):
        assert distance(driver.finished[one.request_id].output, wanted) <= 1e-4


def _part(pipe: Any, path: str) -> torch.nn.Module:
    name, _, within = path.partition(".")
    return getattr(pipe, name).get_submodule(within)


async def together(engine: AsyncDiffusionEngine, asked: list[Any]) -> list[Any]:
    found: list[Any] = [None] * len(asked)

    async def run(place: int) -> None:
        one = asked[place]
        found[place] = await engine.generate(
            one.prompt, request_id=one.request_id, seed=one.seed, output_type=one.output_type, **one.params
        )

    async with anyio.create_task_group() as group:
        for place in range(len(asked)):
            group.start_soon(run, place)
    return found
