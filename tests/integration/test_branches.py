"""Guidance that cuts the batch by branches (PAG) shares forwards among requests of any number of images."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny
import torch
from conformance import parts_sd
from diffusers import StableDiffusionXLControlNetPAGPipeline
from driving import Driver, alone, assert_equal_to_alone, config, distance, request, tensor_of

from steploom import AsyncDiffusionEngine
from steploom.requests import DiffusionRequest
from steploom.weave.batching.layouts import Layout, Segment
from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32}
GUIDED: dict[str, Any] = {"num_inference_steps": 4, **SMALL}


def images(*counts: int, **common: Any) -> list[DiffusionRequest]:
    """Requests for so many images each."""
    asked = {**GUIDED, **common}
    return [request(f"r{i}", f"cat {i}", i, num_images_per_prompt=n, **asked) for i, n in enumerate(counts)]


def kinds(runner: Runner) -> dict[str, str]:
    """What was found out about the denoiser's merges."""
    return {name: said for name, said in runner.stats().kinds.items() if name.startswith("unet")}


def test_requests_for_different_numbers_of_images_share_forwards() -> None:
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, images(1, 2, 3))
    assert driver.sharing("r1") == [3, 3, 3, 3]
    found = kinds(driver.runner)
    assert [said for name, said in found.items() if "by branch" in name] == ["verified"], found
    assert any("do not stand by branch" in said for said in found.values()), found


@pytest.mark.slow
def test_lists_of_prompts_and_mates_with_equal_rows() -> None:
    requests = [
        *images(2, 1, 1, 2),
        request("list", ["a boat", "a house", "snow"], 7, **{**GUIDED, "num_inference_steps": 5}),
        request("both", ["a boat", "a house"], 8, num_images_per_prompt=2, guidance_scale=3.0, **GUIDED),
    ]
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, requests)
    assert driver.sharing("list") == [6, 6, 6, 6, 1]
    assert set(driver.runner.stats().alone_calls) == {"only one"}


@pytest.mark.slow
def test_joining_later_and_two_branches() -> None:
    """Without classifier-free guidance there are two branches: two, four and six rows."""
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, images(2, 1, 3, 2, guidance_scale=1.0), joining=1)
    assert driver.sharing("r1") == [2, 3, 4, 3]
    assert not [said for name, said in kinds(driver.runner).items() if "by branch" in name and said != "verified"]


@pytest.mark.slow
def test_other_branches_stay_apart_and_it_is_said_why() -> None:
    guided, plain = images(1, 2), images(1, 2, guidance_scale=1.0)
    others = [request(f"p{i}", one.prompt, 10 + i, **one.params) for i, one in enumerate(plain)]
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, [*guided, *others])
    assert driver.sharing("r0") == driver.sharing("p0") == [2, 2, 2, 2]
    lonely = Driver(driver.runner)
    lonely.drain([request("a", "a cat", 1, **GUIDED), request("b", "a cat", 2, guidance_scale=1.0, **GUIDED)])
    reasons = list(driver.runner.stats().alone_calls)
    assert any("attention processors (PAGCFGIdentity" in reason for reason in reasons), reasons
    assert not any("float64" in reason for reason in reasons), reasons


@pytest.mark.slow
def test_a_cancelled_neighbour() -> None:
    pipe, requests = tiny.sdxl_pag(), images(1, 2, 3, num_inference_steps=6)
    expected = {one.request_id: alone(pipe, one) for one in requests}
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.tick(requests)
    driver.tick()
    driver.cancel("r1")
    driver.drain()
    assert driver.sharing("r0") == [3, 3, 2, 2, 2, 2]
    for name in ("r0", "r2"):
        assert driver.finished[name].error is None
        assert distance(driver.finished[name].output, expected[name]) <= 1e-4


@pytest.mark.slow
async def test_mean_batch_requests() -> None:
    pipe = tiny.sdxl_pag()
    pipe.set_progress_bar_config(disable=True)
    common = {**GUIDED, "num_inference_steps": 8, "output_type": "latent"}
    async with AsyncDiffusionEngine.from_pipeline(pipe, costs_file=None) as engine:
        for _ in range(2):  # probing and verification are in the first one
            done = await asyncio.gather(
                *(engine.generate("a cat", seed=n, num_images_per_prompt=n, **common) for n in (1, 2, 3))
            )
        assert [out.timings.mean_batch_requests for out in done] == [3, 3, 3]


@pytest.mark.slow
def test_bits_with_batch_invariant() -> None:
    """Nothing of another row count shares a forward; mates with as many images do."""
    requests = images(1, 2, 2)
    lonely = [
        Driver(Runner.from_pipeline(tiny.sdxl_pag(), config(batch_invariant=True, max_batch=3))).drain([one])
        for one in requests
    ]
    expected = {name: report for finished in lonely for name, report in finished.items()}
    driver = Driver(Runner.from_pipeline(tiny.sdxl_pag(), config(batch_invariant=True, max_batch=3)))
    driver.drain(requests)
    assert driver.sharing("r1") == [2, 2, 2, 2]
    assert driver.sharing("r0") == [1] * 4
    for name, report in driver.finished.items():
        assert torch.equal(tensor_of(report.output), tensor_of(expected[name].output)), name


class Odd:
    """A pipeline whose denoiser has no memory for many rows, and raises where a row is poisonous."""

    def __init__(self, room: int = 1000, poison: float | None = None) -> None:
        self.pipe = tiny.sdxl_pag()
        self.rows: list[int] = []
        self._room, self._poison = room, poison
        self.active = False
        self.pipe.unet.register_forward_pre_hook(self._before)

    def _before(self, module: Any, args: Any) -> None:
        self.rows.append(len(args[0]))
        if self.active and len(args[0]) > self._room:
            raise torch.OutOfMemoryError("out of memory (pretended)")
        if self.active and self._poison is not None and bool((args[0][:, 1, 1, 1] == self._poison).any()):
            raise RuntimeError("poisoned row")


@pytest.mark.slow
def test_what_has_no_room_goes_in_halves() -> None:
    odd, requests = Odd(room=15), images(1, 2, 3, 2)
    expected = {one.request_id: alone(odd.pipe, one) for one in requests}
    driver = Driver(Runner.from_pipeline(odd.pipe, config()))
    odd.active = True
    driver.drain(requests)
    for name, output in expected.items():
        assert driver.finished[name].error is None, driver.finished[name].error
        assert distance(driver.finished[name].output, output) <= 1e-4
    assert max(odd.rows) == 24, "it is tried"
    assert set(driver.sharing("r0")[1:]) == {2}, "and halves share"


@pytest.mark.slow
def test_only_the_culprit_fails() -> None:
    requests = images(1, 2, 3)
    odd = Odd()
    seen: list[float] = []
    hook = odd.pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1, 1, 1].item()))
    expected = {one.request_id: alone(odd.pipe, one) for one in requests}
    hook.remove()
    odd._poison, odd.active = seen[4], True  # the first step of the second one
    driver = Driver(Runner.from_pipeline(odd.pipe, config()))
    driver.drain(requests)
    assert "poisoned row" in driver.finished["r1"].error.message
    for name in ("r0", "r2"):
        assert driver.finished[name].error is None, driver.finished[name].error
        assert distance(driver.finished[name].output, expected[name]) <= 1e-4
    assert driver.sharing("r0")[-2:] == [2, 2]


def emphasizes_the_second_half() -> Any:
    """A model that cuts its rows in two whatever they are, so that guidance makes no other merge key."""
    pipe = tiny.sdxl()
    forward = type(pipe.unet).forward

    def halved(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (out,) = forward(self, sample, *args, **kwargs)
        half = len(out) // 2
        return (torch.cat([out[: len(out) - half], out[len(out) - half :] * 1.01]),)

    pipe.unet.__class__ = type("Halving", (type(pipe.unet),), {"forward": halved})
    return pipe


@pytest.mark.slow
def test_calls_of_as_many_branches_share_beside_those_of_others() -> None:
    """Four rows are two images with guidance, or four without: the greatest common divisor would not tell."""
    plain = [
        request(f"p{n}", "a boat", 20 + n, num_images_per_prompt=n, **{**GUIDED, "guidance_scale": 1.0}) for n in (2, 4)
    ]
    driver, _ = assert_equal_to_alone(emphasizes_the_second_half, [*images(1, 2), *plain])
    assert driver.sharing("r0")[-3:] == [2, 2, 2], driver.runner.stats()
    assert set(driver.sharing("p2")) == {1}
    driver.drain([request("one", "a cat", 1, **GUIDED), request("lonely", "a cat", 2, **plain[0].params)])
    lonely = Driver(driver.runner)
    one = request("x", "a cat", 3, **GUIDED)
    lonely.drain([one, request("y", "a boat", 4, **plain[1].params)])
    assert distance(lonely.finished["x"].output, alone(emphasizes_the_second_half(), one)) <= 1e-4
    assert any("branches of guidance" in reason for reason in driver.runner.stats().alone_calls)


def controlnet_pag() -> Any:
    return StableDiffusionXLControlNetPAGPipeline(**tiny.controlnet().components, pag_applied_layers="mid")


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny.controlnet, controlnet_pag])
def test_controlnets_with_several_images(build: Any) -> None:
    driver, _ = assert_equal_to_alone(build, images(1, 2, 3, image=parts_sd.picture(7)))
    assert driver.sharing("r1")[2:] == [3, 3]
    by_branch = [name for name in kinds(driver.runner) if "by branch" in name]
    assert len(by_branch) == (build is controlnet_pag), (
        "who does not mind the order goes end to end, and is not asked again"
    )


@pytest.mark.slow
def test_a_wrong_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the largest call stand one branch too early: then nobody shares, and all is right."""
    right = Layout.segments.func

    def wrong(self: Layout) -> list[Segment]:
        found = right(self)
        return [found[-1], *found[:-1]] if self.by_branch is not None else found

    monkeypatch.setattr(Layout, "segments", property(wrong))
    monkeypatch.setattr(Layout, "split", _split_by_segments(Layout.split))
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, images(1, 2))
    assert set(driver.sharing("r0")) == {1}
    found = kinds(driver.runner)
    assert [said for name, said in found.items() if "by branch" in name and "alone" in said], found


def _split_by_segments(right: Any) -> Any:
    """Splits what the wrong layout has merged, so that only the places are wrong."""

    def split(self: Layout, tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
        if self.by_branch is None:
            return right(self, tensor, axis)
        rows = list(tensor.unbind(axis))
        parts: list[list[torch.Tensor]] = [[] for _ in self.rows]
        for i, at, count in self.segments:
            parts[i] += [(at + n, rows.pop(0)) for n in range(count)]
        return [torch.stack([row for _, row in sorted(own, key=lambda one: one[0])], dim=axis) for own in parts]

    return split
