"""What a request, the application, or a broken input may do without hurting anybody else."""

from __future__ import annotations

import asyncio
import contextvars
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from driving import Driver, alone, config, distance, request
from PIL import Image

from steploom import AsyncDiffusionEngine
from steploom.errors import ConfigError, GenerationFailed, InvalidRequest
from steploom.worker.runner import Runner

SMALL = {"height": 32, "width": 32, "max_sequence_length": 16}


class Boom(Exception):
    """No built-in kind of error: hooks and compilers raise such."""


@pytest.mark.parametrize("kind", [Boom, ZeroDivisionError, OSError, MemoryError])
def test_whatever_a_merged_call_raises_only_the_culprit_fails(kind: type[Exception]):
    pipe = tiny.sd3()

    def bite(module: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["hidden_states"].flatten(1)[:, 0] == 7.0).any():
            raise kind("poisoned row")

    pipe.transformer.register_forward_pre_hook(bite, with_kwargs=True)
    poison = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    poison[0, 0, 0, 0] = 7.0
    requests = [request(n, n, i, num_inference_steps=4, **SMALL) for i, n in enumerate("ab")]
    expected = {r.request_id: alone(pipe, r) for r in requests}
    bad = request("bad", "x", 9, num_inference_steps=4, latents=poison, **SMALL)
    finished = Driver(Runner.from_pipeline(pipe, config())).drain([requests[0], bad, requests[1]])
    assert finished["bad"].error is not None
    assert "poisoned row" in finished["bad"].error.message
    for r in requests:
        assert finished[r.request_id].error is None
        assert distance(finished[r.request_id].output, expected[r.request_id]) <= 1e-4


def test_a_preview_that_cannot_be_made_is_missing_and_no_failure(monkeypatch: pytest.MonkeyPatch):
    runner = Runner.from_pipeline(tiny.sd3(), config())

    def refuse(*args: Any) -> None:
        raise RuntimeError("latents of a layout that nobody knows")

    monkeypatch.setattr(runner._previewer, "_pixels", refuse)
    driver = Driver(runner)
    finished = driver.drain(
        [request("p", "p", 1, num_inference_steps=3, preview_every=1, **SMALL), request("q", "q", 2, **SMALL)]
    )
    assert finished["p"].error is None
    assert finished["q"].error is None
    assert all(report.preview is None for report in driver.reports["p"])


def test_weights_updated_in_place_are_noticed():
    pipe = tiny.sd3()
    driver = Driver(Runner.from_pipeline(pipe, config()))
    one = request("one", "a cat", 1, num_inference_steps=3, **SMALL)
    before = driver.drain([one])["one"].output
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.5)
    two = request("two", "a cat", 1, num_inference_steps=3, **SMALL)
    after = driver.drain([two])["two"].output
    assert distance(after, before) > 1e-2
    assert distance(after, alone(pipe, two)) <= 1e-4


@pytest.mark.parametrize("mode", ["autocast", "inference mode"])
def test_calls_that_cannot_be_shared_are_counted_with_their_reason(mode: str):
    pipe = tiny.sd3()

    class Own(type(pipe)):
        def __call__(self, prompt: Any = None, generator: Any = None, **kwargs: Any) -> Any:
            cast = torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else torch.inference_mode()
            with cast:
                return super().__call__(prompt=prompt, generator=generator, **kwargs)

    Own.__call__.__signature__ = __import__("inspect").signature(type(pipe).__call__)  # type: ignore[attr-defined]
    pipe.__class__ = Own
    runner = Runner.from_pipeline(pipe, config())
    driver = Driver(runner)
    finished = driver.drain([request(n, n, 1, num_inference_steps=2, **SMALL) for n in "ab"])
    assert all(report.error is None for report in finished.values()), finished["a"].error
    assert any(mode in reason for reason in runner.stats().alone_calls), runner.stats().alone_calls


def test_sleeping_when_closed_puts_every_module_back_where_it_was(monkeypatch: pytest.MonkeyPatch):
    pipe = tiny.sd3()
    moves: list[tuple[str, str]] = []
    for name in ("transformer", "vae"):
        module, plain = getattr(pipe, name), getattr(pipe, name).to
        monkeypatch.setattr(module, "to", lambda device, n=name, f=plain: moves.append((n, str(device))) or f(device))
    runner = Runner.from_pipeline(pipe, config())
    runner.sleep(1)
    runner.close()
    assert sorted(moves) == [("transformer", "cpu")] * 2 + [("vae", "cpu")] * 2
    runner.close()
    assert len(moves) == 4


@pytest.mark.parametrize("levels", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_who_sleeps_already_may_be_sent_to_sleep_again(levels: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """And finds its way back: to where it was, and not to where it slept."""
    runner = Runner(tiny.sd3(), config(), reload=tiny.sd3)
    transformer, at = runner.pipeline.transformer, [torch.device("meta")]  # as on a device that no test machine needs
    monkeypatch.setattr(type(transformer), "device", property(lambda _: at[-1]))
    monkeypatch.setattr(transformer, "to", lambda device: at.append(torch.device(device)))
    for level in levels:
        runner.sleep(level)
    runner.wake_up()
    monkeypatch.undo()
    expected = {(1, 1): ["meta", "cpu", "meta"], (1, 2): ["meta", "cpu"]}
    assert [str(device) for device in at] == expected.get(levels, ["meta"])
    assert (runner.pipeline.transformer is transformer) == (2 not in levels)
    assert Driver(runner).drain([request("a", "a", 1, num_inference_steps=1, **SMALL)])["a"].error is None
    runner.close()


def test_sleep_refuses_what_is_group_offloaded():
    pipe = tiny.sd3()
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with pytest.raises(ConfigError, match="group-offloaded"):
        Runner.from_pipeline(pipe, config()).sleep(1)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
async def test_whatever_a_callback_raises_is_its_own_request_failure(kind: type[BaseException]):
    def bad(*args: Any) -> Any:
        raise kind("callback")

    async with AsyncDiffusionEngine.from_pipeline(tiny.sd3()) as engine:
        healthy, failed = await asyncio.gather(
            engine.generate("a", seed=1, num_inference_steps=3, **SMALL),
            engine.generate("b", seed=1, num_inference_steps=3, callback_on_step_end=bad, **SMALL),
            return_exceptions=True,
        )
        assert isinstance(failed, GenerationFailed)
        assert len(healthy.images) == 1
        assert len((await engine.generate("c", num_inference_steps=1, **SMALL)).images) == 1


async def test_callbacks_see_the_context_of_whoever_asked():
    tag: contextvars.ContextVar[str] = contextvars.ContextVar("tag", default="nobody")
    seen: list[str] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(tag.get())
        return values

    async with AsyncDiffusionEngine.from_pipeline(tiny.sd3()) as engine:
        tag.set("mine")
        await engine.generate("a", num_inference_steps=2, callback_on_step_end=look, **SMALL)
    assert seen == ["mine", "mine"]


@pytest.mark.parametrize("build", [tiny.sd3, tiny.sdxl_pag])
async def test_the_pipeline_may_be_called_directly_meanwhile(build: Any):
    """From another thread, with attention processors of its own (PAG) and prompts of other lengths."""
    pipe = build()
    size = {"height": 32, "width": 32}
    plain = {**size, "pag_scale": 0.0} if build is tiny.sdxl_pag else size
    requests = [request(f"r{i}", "w" * (3 * i + 1), i, num_inference_steps=4, **plain) for i in range(4)]
    direct = request("direct", "a prompt of its own", 99, num_inference_steps=4, **size)
    expected = {r.request_id: alone(pipe, r) for r in [*requests, direct]}
    stop, wrong = threading.Event(), []

    def call_on() -> None:
        while not stop.is_set():
            if distance(alone(pipe, direct), expected["direct"]) > 1e-4:
                wrong.append("direct")

    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        calls = asyncio.get_running_loop().run_in_executor(None, call_on)
        try:
            for _ in range(3):
                outs = await asyncio.gather(
                    *(engine.generate(r.prompt, seed=r.seed, output_type="latent", **r.params) for r in requests)
                )
                for r, out in zip(requests, outs, strict=True):
                    assert distance(out.output, expected[r.request_id]) <= 1e-4
        finally:
            stop.set()
            await calls
    assert not wrong


def _broken(kind: str, folder: Path) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "PNG" if "png" in kind else "JPEG")
    if kind == "closed png":
        file = folder / "closed.png"
        file.write_bytes(whole.getvalue())
        picture = Image.open(file)
        picture.close()
        return picture
    return Image.open(io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mp", "inproc"])
async def test_a_picture_that_cannot_be_read_is_its_own_request_failure(backend: str, tiny_model: Path, tmp_path: Path):
    settings = {"task": "image-to-image", "distributed_executor_backend": backend, "torch_threads": 1}
    good = {"image": Image.new("RGB", (32, 32), "red"), "seed": 1, "num_inference_steps": 8, "height": 32, "width": 32}
    async with AsyncDiffusionEngine(model=str(tiny_model), **settings) as engine:
        async with engine.stream("a cat", **good) as healthy:
            for kind in ("truncated jpeg", "truncated png", "closed png"):
                with pytest.raises(InvalidRequest, match="image: the image cannot be read"):
                    await engine.generate("x", **{**good, "image": _broken(kind, tmp_path)})
            assert len((await healthy.result()).images) == 1
        assert len((await engine.generate("later", **good)).images) == 1


@pytest.mark.parametrize("given", [{"seed": 1}, {"generator": 1}], ids=["seed", "generator"])
def test_what_is_learned_from_a_first_request_draws_nothing_of_the_applications(given: dict[str, int]):
    """``torch.randn`` without a generator goes on as if nothing had been served, as it does beside ``pipe(...)``."""
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config()))
    params: dict[str, Any] = {"generator": torch.Generator().manual_seed(1)} if "generator" in given else {}
    one = request("a", "a cat", given.get("seed"), num_inference_steps=2, **params, **SMALL)
    before = torch.get_rng_state()
    assert driver.drain([one])["a"].error is None
    assert torch.equal(torch.get_rng_state(), before)
