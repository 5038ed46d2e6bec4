"""With ``batch_invariant`` a request's bits do not depend on who shares its forwards, nor on when who came and went."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import bits_by_place
import lora_files
import pytest
import tiny
import torch
from conformance.families import flux_2
from driving import Driver, alone, config, distance, request, tensor_of

from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner

MOST = 4
PLACES = MOST + 1
"""The last one is a copy's."""
PROMPTS = ["a red cat", "two boats", "snow", "an old house"]


def some(luck: random.Random, name: str, extra: dict[str, Any]) -> DiffusionRequest:
    params = {"num_inference_steps": luck.randint(1, 5), "guidance_scale": luck.choice([1.0, 3.0, 7.5]), **extra}
    return request(name, luck.choice(PROMPTS), luck.randint(0, 9), height=32, width=luck.choice([32, 32, 48]), **params)


def meets(runner: Runner, luck: random.Random, watched: list[DiffusionRequest], extra: dict[str, Any]) -> Driver:
    """The watched requests among others that come and go as luck has it, never more than fit into a forward."""
    driver, waiting, others = Driver(runner), list(watched), 0
    luck.shuffle(waiting)
    while waiting or driver.running:
        join: list[DiffusionRequest] = []
        for _ in range(luck.randint(0, MOST - len(driver.running))):
            if waiting and luck.random() < 0.4:
                join.append(waiting.pop())
            elif waiting and luck.random() < 0.5:
                others += 1
                join.append(some(luck, f"other{others}", extra))
        driver.tick(join)
        gone = [run for run in driver.running if run.startswith("other") and luck.random() < 0.2]
        for run in gone:
            driver.cancel(run)
    return driver


@pytest.mark.parametrize(
    ("build", "rounds", "extra"),
    [
        (tiny.sd3, 4, {}),
        pytest.param(tiny.sdxl, 4, {}, marks=pytest.mark.slow),
        pytest.param(tiny.flux, 4, {}, marks=pytest.mark.slow),
        pytest.param(tiny.qwen_image, 4, {"true_cfg_scale": 2.0}, marks=pytest.mark.slow),
        pytest.param(tiny.sd3, 100, {}, marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
    ids=["sd3", "sdxl", "flux", "qwen", "sd3 a hundred times"],
)
def test_bits_do_not_depend_on_company(build: Callable[[], Any], rounds: int, extra: dict[str, Any]) -> None:
    pipe, luck = build(), random.Random(build.__name__)
    watched = [some(luck, f"watched{i}", extra) for i in range(6)]
    expected: dict[str, Any] = {}
    for one in watched:
        lonely = Driver(Runner.from_pipeline(build(), config(batch_invariant=True, max_batch=MOST)))
        expected[one.request_id] = lonely.drain([one])[one.request_id].output
        assert distance(expected[one.request_id], alone(pipe, one)) < 1e-4, (
            "it is the image of the pipeline all the same"
        )
    runner = Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=MOST))
    shared = 0.0
    for _ in range(rounds):
        driver = meets(runner, luck, watched, extra)
        for name, image in expected.items():
            report = driver.finished[name]
            assert report.error is None, report.error and report.error.traceback
            assert torch.equal(tensor_of(report.output), tensor_of(image)), name
            shared = max(shared, *driver.sharing(name))
    assert shared > 1, "forwards are shared"
    runner.close()


@pytest.mark.parametrize("most", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_the_place_in_the_batch(most: int) -> None:
    """Rows of Wan that do not fill a vector of the processor: its last elements are computed one by one."""
    pipe, size = tiny.wan(), {"num_frames": 5, "height": 16, "width": 16, "max_sequence_length": 16}
    watched = request("watched", "a cat", 1, num_inference_steps=3, **size)

    def drawn(place: int, company: int) -> torch.Tensor:
        driver = Driver(Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=most)))
        mates = [request(f"mate{n}", "two boats", n, num_inference_steps=3, **size) for n in range(2, 2 + company)]
        driver.drain([*mates[:place], watched, *mates[place:]])
        assert max(driver.sharing("watched")) == company + 1
        return tensor_of(driver.finished["watched"].output)

    lonely = drawn(0, 0)
    for place in range(most):
        assert torch.equal(drawn(place, most - 1), lonely), place


@pytest.mark.slow
def test_bits_do_not_depend_on_the_adapters_of_others(tmp_path: pathlib.Path) -> None:
    """PEFT computes the rows of each adapter apart: how many they are would show in a layer of vectors."""
    names = [lora_files.save(tiny.sd3, tmp_path / str(n), n, targets=LAYERS) for n in (3, 4)]
    pipe, size = (
        tiny.sd3(),
        {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 4.0, "max_sequence_length": 16},
    )
    runner = Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=2))
    kinds: list[Any] = [None, names[0], [(names[0], 0.5)], names[1]]
    for own in kinds[1:3]:
        watched = request("watched", "a cat", 1, lora=own, **size)
        images: list[torch.Tensor] = []
        for mates in ([], *([kind] for kind in kinds)):
            driver = Driver(runner)
            driver.drain([watched, *(request("mate", "a cat", 5, lora=one, **size) for one in mates)])
            images.append(tensor_of(driver.finished["watched"].output))
        assert all(torch.equal(one, images[0]) for one in images[1:]), own


LAYERS = ("to_q", "to_v", "norm1.linear")
GUIDED: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
MARK = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))[0, 0, 0, 0].item()
"""Seed 7 is poisonous."""


class Faulty:
    """A runner with room for ``MOST`` whose transformer raises where a row is poisonous, and when it is told to."""

    def __init__(self, *, warm: bool = True) -> None:
        self.faults: list[Exception] = []
        self.room = 100
        self.rows: list[int] = []
        pipe = tiny.sd3()
        pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        self.driver = Driver(Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=MOST)))
        if warm:
            self.draw(3, 4)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        latents = kwargs["hidden_states"]
        self.rows.append(len(latents))
        if len(latents) == 2 * PLACES and self.faults:
            raise self.faults.pop()
        if len(latents) > self.room:
            raise torch.OutOfMemoryError("out of memory (pretended)")
        if bool((latents[:, 0, 0, 0] == MARK).any()):
            raise RuntimeError("poisoned row")

    def draw(self, *seeds: int) -> dict[int, Any]:
        """What came of requests that run together: tensors, or errors."""
        names = {f"{len(self.driver.finished)}-{seed}": seed for seed in seeds}
        self.driver.drain([request(name, f"cat {seed}", seed, **GUIDED) for name, seed in names.items()])
        reports = {seed: self.driver.finished[name] for name, seed in names.items()}
        return {seed: one.error or tensor_of(one.output) for seed, one in reports.items()}


def test_a_mate_that_fails_leaves_the_bits_as_they_are() -> None:
    calm, faulty = Faulty(), Faulty()
    before = len(faulty.rows)
    drawn = faulty.draw(1, 7, 2)
    assert "poisoned row" in drawn[7].message
    assert len(faulty.rows) - before == 1 + 3 + 3, "together, then each once, then three steps of those that are left"
    for seed in (1, 2):
        assert torch.equal(drawn[seed], calm.draw(seed)[seed])


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RuntimeError, pytest.param(torch.OutOfMemoryError, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["by itself", "with a mate"])
@pytest.mark.parametrize("warm", [True, False], ids=["verified", "not verified yet"])
def test_a_fault_that_passes_leaves_the_bits_as_they_are(
    fault: type[Exception], seeds: tuple[int, ...], warm: bool
) -> None:
    calm, faulty = Faulty(), Faulty(warm=warm)
    faulty.faults.append(fault("a passing fault"))
    drawn = faulty.draw(*seeds)
    assert not faulty.faults, "it was met"
    for seed in seeds:
        assert torch.equal(drawn[seed], calm.draw(seed)[seed])
    assert torch.equal(faulty.draw(5)[5], calm.draw(5)[5]), "nor does it leave a mark"
    assert set(faulty.driver.runner.stats().kinds.values()) == {"verified"}


@pytest.mark.slow
def test_two_faults_of_memory_in_a_row_fail_nobody() -> None:
    calm, faulty = Faulty(), Faulty()
    faulty.faults = [RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("out of memory (pretended)")]
    drawn = faulty.draw(1, 2)
    assert not faulty.faults, "both were met"
    for seed in (1, 2):
        assert torch.equal(drawn[seed], calm.draw(seed)[seed])


@pytest.mark.slow
@pytest.mark.parametrize("warm", [True, False], ids=["verified", "not verified yet"])
def test_who_has_no_room_with_its_copies_fails_with_the_mend_and_without_a_smaller_forward(warm: bool) -> None:
    calm, faulty = Faulty(), Faulty(warm=warm)
    faulty.room = 4
    drawn = faulty.draw(1, 2)
    for error in drawn.values():
        assert error.kind == "GenerationFailed"
        assert "max_batch=4" in error.message
        assert "lower max_batch" in error.message
    assert faulty.rows[-5:] == [2 * PLACES] * 5, "together, and then each twice"
    faulty.room = 100
    assert torch.equal(faulty.draw(1)[1], calm.draw(1)[1])


def test_a_module_that_takes_one_request_at_a_time_serves_each_by_itself() -> None:
    pipe = tiny.sd3()

    def one_only(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["hidden_states"]) > 2:
            raise ValueError("one request at a time, please")

    pipe.transformer.register_forward_pre_hook(one_only, with_kwargs=True)
    driver = Driver(Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=MOST)))
    asked = [request(f"r{seed}", f"cat {seed}", seed, **GUIDED) for seed in (1, 2)]
    finished = driver.drain(asked)
    for one in asked:
        assert torch.equal(tensor_of(finished[one.request_id].output), tensor_of(alone(tiny.sd3(), one)))
    assert any("one request at a time" in reason for reason in driver.runner.stats().kinds.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("sd3", 2), ("sd3", 4), ("sdxl", 2), ("flux", 2), ("wan", 4)])
def test_bits_do_not_depend_on_the_place_where_two_threads_compute(name: str, most: int) -> None:
    """Of six rows of float32 a second thread rounds the last two otherwise."""
    line = [sys.executable, bits_by_place.__file__, name, "2", str(most)]
    paths = [path for path in sys.path if path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found = json.loads(subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout)
    assert found["same"] == [True] * most
    assert found["shared"] == most, "forwards are shared all the same"
    assert found["kinds"] == ["verified"]


class Uneven:
    """A tiny SD3 whose transformer gives each row other last bits by where it stands, as ``by_place`` says.

    ``by_place`` gets the number of rows and the texts, and returns what is added to the places, from 0 on.
    """

    def __init__(self, by_place: Callable[[int, torch.Tensor], float]) -> None:
        self.pipe, self.by_place = tiny.sd3(), by_place
        self.rows: list[int] = []
        self.pipe.transformer.register_forward_hook(self._after, with_kwargs=True)
        self.driver = Driver(Runner.from_pipeline(self.pipe, config(batch_invariant=True, max_batch=2)))

    def _after(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        texts, (made, *others) = kwargs["encoder_hidden_states"], result
        self.rows.append(len(made))
        if len(made) == 2:
            return result
        each = self.by_place(len(made), texts) * torch.arange(len(made))
        return (made + each.view(-1, 1, 1, 1), *others)

    def draw(self, **asked: dict[str, Any]) -> list[torch.Tensor]:
        """What comes of requests that run together."""
        made = [request(name, own.pop("prompt", "a cat"), 1, **{**GUIDED, **own}) for name, own in asked.items()]
        finished = self.driver.drain(made)
        assert not [report.error for report in finished.values() if report.error]
        return [tensor_of(finished[name].output) for name in asked]


def test_where_a_block_of_rows_is_needed_forwards_hold_one() -> None:
    def ragged(rows: int, texts: torch.Tensor) -> float:
        return 1e-3 if rows % 8 else 0.0

    company, lonely = Uneven(ragged), Uneven(ragged)
    _, second = company.draw(a={}, b={"guidance_scale": 3.0})
    (expected,) = lonely.draw(b={"guidance_scale": 3.0})
    assert torch.equal(second, expected)
    assert company.rows[-3:] == lonely.rows[-3:] == [8] * 3
    assert company.driver.sharing("b")[-1] == 2


def test_where_no_number_of_rows_will_do_each_runs_by_itself() -> None:
    company = Uneven(lambda rows, texts: 1e-3)
    first, second = company.draw(a={}, b={"guidance_scale": 3.0})
    for made, own in ((first, {}), (second, {"guidance_scale": 3.0})):
        one = request("one", "a cat", 1, **GUIDED, **own)
        assert torch.equal(made, tensor_of(alone(tiny.sd3(), one)))
    assert company.rows[-2:] == [2, 2]
    assert company.driver.runner.stats().alone_calls["the bits of a row depend on its place"] >= 6


def test_zeros_of_the_first_request_do_not_hide_how_rows_are_added_up() -> None:
    def by_text(rows: int, texts: torch.Tensor) -> float:
        return 1e-3 * texts.abs().mean().item()

    nothing: dict[str, Any] = {
        "prompt": None,
        "prompt_embeds": torch.zeros(1, 32, 64),
        "negative_prompt_embeds": torch.zeros(1, 32, 64),
        "pooled_prompt_embeds": torch.zeros(1, 64),
        "negative_pooled_prompt_embeds": torch.zeros(1, 64),
    }
    company = Uneven(by_text)
    company.draw(first=dict(nothing))
    something = {**nothing, "prompt_embeds": torch.ones(1, 32, 64)}
    _, second = company.draw(a=dict(nothing), b=dict(something))
    (expected,) = Uneven(by_text).draw(b=dict(something))
    assert torch.equal(second, expected)


def test_who_comes_first_does_not_decide_what_is_learned() -> None:
    """FLUX.2 reads one row's position ids for all: beside a portrait of its area a landscape taught another lesson."""

    def asked(name: str, height: int, width: int) -> DiffusionRequest:
        size = {"height": height, "width": width, "max_sequence_length": 32, "text_encoder_out_layers": (0, 1, 2)}
        return request(name, "a red circle", 1, num_inference_steps=2, guidance_scale=3.0, **size)

    def drawn(*others: DiffusionRequest) -> Driver:
        driver = Driver(Runner.from_pipeline(flux_2._dev(), config(batch_invariant=True, max_batch=3)))
        driver.drain([asked("landscape", 32, 128), *others])
        return driver

    lonely, company = drawn(), drawn(asked("portrait", 128, 32), asked("like it", 32, 128))
    images = [tensor_of(driver.finished["landscape"].output) for driver in (lonely, company)]
    assert torch.equal(*images)
    assert set(lonely.runner.stats().kinds.values()) == set(company.runner.stats().kinds.values()) == {"verified"}
    assert company.sharing("landscape")[-1] == 2
