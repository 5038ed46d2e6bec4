"""Every pipeline equals itself alone, whoever shares its forwards, and its forwards really are shared."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
import torch
from driving import Driver, alone, assert_equal_to_alone, config, distance, request
from PIL import Image

from steploom.errors import ConfigError
from steploom.worker.runner import Runner

SMALL = {"height": 32, "width": 32}
TEXT = {**SMALL, "max_sequence_length": 16}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (32, 32, 3), dtype=np.uint8))


def mixed_requests(**common):
    """Different steps, guidance, seeds, one without guidance and one with two images per prompt."""
    return [
        request("a", "a cat", 1, num_inference_steps=4, **common),
        request("b", "dogs", 2, num_inference_steps=6, guidance_scale=3.0, **common),
        request("c", "x", 3, num_inference_steps=5, guidance_scale=1.0, **common),
        request("d", "two", 4, num_inference_steps=5, num_images_per_prompt=2, **common),
    ]


@pytest.mark.parametrize(
    ("build", "common"), [(tiny.sd3, TEXT), (tiny.flux, TEXT), (tiny.sdxl, SMALL)], ids=["sd3", "flux", "sdxl"]
)
def test_mixed_requests_share_forwards(build, common):
    driver, _ = assert_equal_to_alone(build, mixed_requests(**common))
    # Also the very first one: to be probed its call runs alone, but it is answered by the merged one.
    assert driver.sharing("a") == [4, 4, 4, 4]
    assert driver.sharing("b") == [4, 4, 4, 4, 3, 1]


def test_what_probing_found_answers_a_call_with_nobody_to_share_with():
    rows = []

    def watched():
        pipe = tiny.sd3()
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        return pipe

    driver = Driver(Runner.from_pipeline(watched(), config()))
    driver.drain([request("a", "a cat", 1, num_inference_steps=4, guidance_scale=1.0, **TEXT)])
    assert driver.sharing("a") == [1] * 4
    assert rows.count(1) == 4, "others are probes, of two samples"


def test_late_joiners():
    driver, _ = assert_equal_to_alone(tiny.sd3, mixed_requests(**TEXT), joining=1)
    assert max(driver.sharing("a")) == 4


def test_controlnet_before_unet():
    requests = [
        request("a", "a cat", 1, num_inference_steps=4, image=picture(0), **SMALL),
        request("b", "dogs", 2, num_inference_steps=6, guidance_scale=3.0, image=picture(1), **SMALL),
        request("c", "x", 3, num_inference_steps=5, guidance_scale=1.0, image=picture(2), **SMALL),
    ]
    driver, _ = assert_equal_to_alone(tiny.controlnet, requests)
    assert driver.sharing("b") == [3, 3, 3, 3, 2, 1]


def test_a_finished_controlnet_does_not_split_the_batch():
    """Programs past their control's end reach the UNet first: it must wait for those at the ControlNet."""
    requests = [
        request("a", "a cat", 1, num_inference_steps=6, image=picture(0), control_guidance_end=0.3, **SMALL),
        request("b", "dogs", 2, num_inference_steps=6, image=picture(1), **SMALL),
    ]
    driver, pipe = assert_equal_to_alone(tiny.controlnet, requests)
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    driver = Driver(driver.runner)
    driver.drain(requests)
    assert calls.count(4) >= 2, "the two steps with both controls share a forward"


def test_pag_branches_share_a_forward():
    requests = [
        request("a", "a cat", 1, num_inference_steps=5, **SMALL),
        request("b", "dogs", 2, num_inference_steps=6, guidance_scale=3.0, **SMALL),
        request("c", "x", 3, num_inference_steps=6, guidance_scale=1.0, **SMALL),
        request("d", "y", 4, num_inference_steps=6, guidance_scale=1.0, pag_scale=2.0, **SMALL),
        request("e", "z", 5, num_inference_steps=6, pag_scale=0.0, **SMALL),
    ]
    driver, _ = assert_equal_to_alone(tiny.sdxl_pag, requests)
    assert driver.sharing("b")[1:5] == [2, 2, 2, 2]
    assert driver.sharing("d") == [2] * 6


def test_cancelled_pag_leaves_no_processors_behind():
    pipe = tiny.sdxl_pag()
    before = dict(pipe.unet.attn_processors)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.tick([request("a", "a cat", 1, num_inference_steps=6, **SMALL)])
    assert pipe.unet.attn_processors == before
    driver.cancel("a")
    driver.tick()
    assert driver.runner.stats().resident == 0
    assert pipe.unet.attn_processors == before
    assert all(now is was for now, was in zip(pipe.unet.attn_processors.values(), before.values(), strict=True))


def test_vae_upcast_holds_for_every_request_of_a_batch():
    """SDXL's VAE is decoded in float32 for the second and third request too, and is float16 again afterwards."""
    pipe = tiny.sdxl_half_vae()
    seen: list[torch.dtype] = []
    requests = [request(n, n, i, "np", num_inference_steps=3 + i % 2, **SMALL) for i, n in enumerate("abcd")]
    expected = {r.request_id: alone(pipe, r) for r in requests}
    runner = Runner.from_pipeline(pipe, config())
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    finished = Driver(runner).drain(requests)
    for r in requests:
        report = finished[r.request_id]
        assert report.error is None, report.error
        assert np.abs(report.output.images - expected[r.request_id].images).max() <= 1 / 255
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}


def test_qwen_merges_ragged_prompts_but_not_landscape_with_portrait():
    requests = [
        request("short", "a cat", 1, num_inference_steps=6, height=16, width=64),
        request("long", "a much longer prompt", 2, num_inference_steps=6, height=16, width=64),
        request(
            "cfg", "abc", 3, num_inference_steps=5, height=16, width=64, true_cfg_scale=3.0, negative_prompt="bad one"
        ),
        request("tall", "a cat", 4, num_inference_steps=6, height=64, width=16),
        request("taller", "dog", 5, num_inference_steps=6, height=64, width=16),
    ]
    driver, _ = assert_equal_to_alone(tiny.qwen_image, requests)
    assert driver.sharing("short")[2:5] == [3, 3, 3]
    assert driver.sharing("tall")[2:] == [2] * 4
    keys = {name: driver.reports[name][3].batch_key for name in ("short", "long", "tall")}
    assert keys["short"] == keys["long"] != keys["tall"]


def test_wan_video():
    video = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    requests = [
        request("a", "a cat", 1, num_inference_steps=4, **video),
        request("b", "dog", 2, num_inference_steps=6, guidance_scale=3.0, **video),
        request("c", "x", 3, num_inference_steps=5, guidance_scale=1.0, **video),
    ]
    driver, _ = assert_equal_to_alone(tiny.wan, requests)
    # Two calls a step under guidance: the first shared by all three, the second by the two that have guidance.
    assert driver.sharing("c") == [3, 3, 3, 3, 2]
    assert driver.sharing("a") == [2.5, 2.5, 2.5, 2.5]


def test_24_requests_of_one_model():
    """Different steps, guidance, seeds and arrival; every one as if alone."""
    random.seed(24)
    requests = [
        request(
            f"r{i}", f"prompt {i}", 100 + i, num_inference_steps=random.randint(3, 9),
            guidance_scale=random.choice([1.0, 2.5, 4.0, 7.0]), **TEXT,
        )
        for i in range(24)
    ]  # fmt: skip
    driver, _ = assert_equal_to_alone(tiny.sd3, requests, joining=3)
    assert sum(driver.sharing("r12")) / len(driver.sharing("r12")) > 8


@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
def test_images_within_one_grey_level(size):
    height, width = size
    pipe = tiny.sd3()
    requests = [
        request(n, n, i, "pil", num_inference_steps=4 + i, height=height, width=width, max_sequence_length=16)
        for i, n in enumerate("abc")
    ]
    expected = {r.request_id: alone(pipe, r) for r in requests}
    finished = Driver(Runner.from_pipeline(pipe, config())).drain(requests)
    for r in requests:
        ours, theirs = (
            np.asarray(o.images[0], np.int16) for o in (finished[r.request_id].output, expected[r.request_id])
        )
        assert ours.shape == (height, width, 3)
        assert ours.std() > 1
        assert np.abs(ours - theirs).max() <= 1


def test_two_shapes_at_once_do_not_disturb_each_other():
    requests = [
        request(n, n, i, num_inference_steps=5, height=32, width=side, max_sequence_length=16)
        for i, (n, side) in enumerate([("a", 32), ("b", 48), ("c", 32), ("d", 48)])
    ]
    driver, _ = assert_equal_to_alone(tiny.sd3, requests)
    assert driver.sharing("a") == [2] * 5
    assert driver.sharing("b") == [2] * 5


def test_cancelled_neighbours_change_nothing():
    pipe = tiny.sd3()
    requests = mixed_requests(**TEXT)
    expected = alone(pipe, requests[1])
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.tick(requests)
    driver.tick()
    driver.cancel("a")
    driver.tick()
    driver.cancel("c")
    driver.drain()
    assert distance(driver.finished["b"].output, expected) <= 1e-4
    assert set(driver.finished) == {"b", "d"}


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", ["method", "wrapper"])
def test_compiled_transformer(compile_it):
    def build():
        pipe = tiny.sd3()
        if compile_it == "method":
            pipe.transformer.compile(backend="aot_eager", dynamic=True)
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", dynamic=True)
        return pipe

    driver, pipe = assert_equal_to_alone(build, mixed_requests(**TEXT))
    assert driver.sharing("a") == [4, 4, 4, 4]
    assert hasattr(pipe.transformer, "_orig_mod") == (compile_it == "wrapper")


def test_accelerate_offloading_and_stateful_caches_are_refused_with_the_mend():
    from accelerate.hooks import ModelHook, add_hook_to_module
    from diffusers import FirstBlockCacheConfig

    offloaded = tiny.sd3()
    add_hook_to_module(offloaded.transformer, ModelHook())  # what both enable_*_cpu_offload put on a module
    with pytest.raises(ConfigError, match=r"transformer.*enable_group_offload"):
        Runner.from_pipeline(offloaded, config())
    cached = tiny.flux()
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ConfigError, match="disable_cache"):
        Runner.from_pipeline(cached, config())


def fingerprint(pipe):
    """Everything about a pipeline that serving it could have touched."""
    state = {name: id(value) for name, value in vars(pipe).items()}
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            state[name, "tensors"] = [
                (n, id(t), t._version, t.dtype) for n, t in module.state_dict(keep_vars=True).items()
            ]
            for path, child in module.named_modules():
                kept = {k: v for k, v in vars(child).items() if not k.startswith("_backward")}
                state[name, path] = {k: list(v) if isinstance(v, dict) else id(v) for k, v in kept.items()}
    state["scheduler", "state"] = {k: repr(v) for k, v in vars(pipe.scheduler).items()}
    return state


@pytest.mark.parametrize("build", [tiny.sd3, tiny.sdxl_pag, tiny.sdxl_half_vae], ids=["sd3", "pag", "half-vae"])
def test_the_users_pipeline_is_exactly_as_before(build):
    pipe = build()
    alone(pipe, request("warm", "warm", num_inference_steps=2, **SMALL))
    before = fingerprint(pipe)
    runner = Runner.from_pipeline(pipe, config())
    driver = Driver(runner)
    driver.drain([request(n, n, i, "pil", num_inference_steps=3, **SMALL) for i, n in enumerate("abc")])
    driver.tick([request("cut", "cut", 9, num_inference_steps=9, **SMALL)])
    runner.close()
    assert fingerprint(pipe) == before


def test_a_direct_call_meanwhile_still_works():
    pipe = tiny.sd3()
    requests = mixed_requests(**TEXT)
    expected = {r.request_id: alone(pipe, r) for r in requests}
    driver = Driver(Runner.from_pipeline(pipe, config()))
    driver.tick(requests[1:])
    driver.tick()
    assert distance(alone(pipe, requests[0]), expected["a"]) == 0.0
    driver.drain()
    for name in "bcd":
        assert distance(driver.finished[name].output, expected[name]) <= 1e-4


def test_per_request_noise_scheduler():
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny.sdxl()
    plain = request("a", "a cat", 1, num_inference_steps=4, **SMALL)
    own = request("b", "a cat", 1, num_inference_steps=4, noise_scheduler="DPMSolverMultistepScheduler", **SMALL)
    first = alone(pipe, plain)
    original, pipe.scheduler = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    second = alone(pipe, own)
    pipe.scheduler = original
    finished = Driver(Runner.from_pipeline(pipe, config())).drain([plain, own])
    assert distance(finished["a"].output, first) <= 1e-4
    assert distance(finished["b"].output, second) <= 1e-4
    assert distance(first, second) > 0.01
