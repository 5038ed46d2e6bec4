"""What a pipeline raises at its arguments, however deep, is the request's fault; what else it raises is not."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import diffusers
import pytest
import tiny
import torch
from conformance.case import CASES
from driving import Driver, config
from PIL import Image

from steploom import DiffusionRequest, InvalidRequest
from steploom.protocol import RequestReport
from steploom.weave import pipelines
from steploom.worker.blame import fault as blame
from steploom.worker.runner import Runner
from steploom.worker.trials import trial

SD, XL, FLUX, LTX = "StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline", "FluxPipeline", "LTXPipeline"
SD3, LLADA, QWEN, FILL = "StableDiffusion3Pipeline", "LLaDA2Pipeline", "QwenImagePipeline", "FluxFillPipeline"
COGVIDEO, V2V = "CogVideoXPipeline", "CogVideoXVideoToVideoPipeline"
FLUX2, LTX2 = "Flux2KleinPipeline", "LTX2Pipeline"
CONTROL, VACE = "StableDiffusionXLControlNetPipeline", "WanVACEPipeline"
GUIDED_FROM_END = {"control_guidance_start": 0.8, "control_guidance_end": 0.2}
INPAINT, DREAM, COSMOS = "StableDiffusionInpaintPipeline", "DreamLitePipeline-edit", "CosmosVideoToWorldPipeline"


def empty(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (SD, {"clip_skip": 50}, "clip_skip", "clip_skip=50: the pipeline cannot go on with this (IndexError: tuple index"),
    (SD, {"latents": empty(1, 7, 8, 8)}, "latents", "latents=<Tensor [1, 7, 8, 8] float32>: the pipeline cannot"),
    (SD, {"latents": empty(1, 64, 16)}, "latents", "expected input[1, 2, 64, 16] to have 4 channels"),
    (SD, {"sigmas": [1.0, 0.5]}, "sigmas", "does not support custom sigmas"),
    (SD, {"timesteps": [500, 200]}, "timesteps", "timesteps=[500, 200]: the pipeline cannot go on with this"),
    (SD, {"prompt": None, "prompt_embeds": empty(1, 4, 7)}, "prompt_embeds", "Sizes of tensors must match"),
    (SD, {"negative_prompt_embeds": empty(3)}, "negative_prompt_embeds", "<Tensor [3] float32>"),
    (
        SD,
        {"ip_adapter_image": Image.new("RGB", (16, 16))},
        "ip_adapter_image",
        "has no IP-Adapter; load one (pipe.load",
    ),
    (SD, {"callback_on_step_end_tensor_inputs": ["nope"]}, "callback_on_step_end_tensor_inputs", "has to be in"),
    (XL, {"clip_skip": 3}, "clip_skip", "clip_skip=3"),
    (CONTROL, {"prompt": ["a", "b"], "prompt_2": "c"}, "prompt_2", "prompt_2='c': the pipeline cannot go on with"),
    (XL, {"clip_skip": 3, "image": Image.new("L", (16, 16))}, "clip_skip", "clip_skip=3: the pipeline"),
    (XL, {"strength": -0.5}, "strength", "strength=-0.5: The value of strength should in [0.0, 1.0] but is -0.5"),
    (XL, {"sigmas": [1.0, 0.5], "timesteps": [500, 100]}, "sigmas", "Only one of `timesteps` or `sigmas`"),
    (XL, {"original_size": (16,)}, "original_size", "original_size=(16): "),
    (XL, {"negative_prompt_embeds": empty(1, 16, 32)}, "negative_pooled_prompt_embeds", "pooled_prompt_embeds=None: "),
    (XL, {"prompt": None, "prompt_embeds": empty(1, 16, 32)}, "pooled_prompt_embeds", "pooled_prompt_embeds=None: "),
    (XL, {"pooled_prompt_embeds": empty(1, 4, 7)}, "pooled_prompt_embeds", "<Tensor [1, 4, 7] float32>"),
    (XL, {"image": Image.new("L", (16, 16))}, "image", "is of mode L; convert it"),
    (XL, {"image": Image.new("RGB", (1, 1))}, "image", "image=<RGB image of 1x1>: "),
    (XL, {"image": [Image.new("RGB", (16, 16))] * 2}, "image", "[<RGB image of 16x16>, <RGB image of 16x16>]"),
    (FLUX, {"latents": empty(1)}, "latents", "latents=<Tensor [1] float32>: "),
    (FLUX, {"latents": empty(1, 4, 3, 3)}, "latents", "shapes cannot be multiplied"),
    (FLUX, {"max_sequence_length": 600}, "max_sequence_length", "cannot be greater than 512 but is 600"),
    (FLUX, {"ip_adapter_image": Image.new("RGB", (16, 16))}, "ip_adapter_image", "FluxPipeline has no IP-Adapter; "),
    (FLUX, {"ip_adapter_image_embeds": [empty(1, 1, 8)]}, "ip_adapter_image_embeds", "has no IP-Adapter; "),
    (SD, {"prompt": None}, "prompt", "prompt=None, prompt_embeds=None: Provide either `prompt` or"),
    (LTX, {"prompt_embeds": empty(1, 4, 7)}, "prompt", "and `prompt_embeds`: <Tensor>. Please make sure"),
    (LLADA, {"prompt": None}, "prompt", "Provide one of `prompt`, `messages`, or `input_ids`"),
    (XL, {"prompt": None, "image": Image.new("L", (16, 16))}, "prompt", "prompt=None, prompt_embeds=None: Provide"),
    (FILL, {"mask_image": None}, "mask_image", "mask_image=None: Please provide `mask_image` when passing `image`"),
    (INPAINT, {"padding_mask_crop": 4, "output_type": "latent"}, "output_type", "output_type='latent': The output"),
    (SD3, {"prompt": "\ud800"}, "prompt", "prompt='\\ud800': TextEncodeInput must be"),
    (SD3, {"negative_prompt": ["\ud800"]}, "negative_prompt", "negative_prompt=['\\ud800']: the pipeline"),
    (SD3, {"prompt": ["a cat of height", 5]}, "prompt", "prompt=['a cat of height', 5]: "),
    (DREAM, {"width": 38}, "width", "width=38: the pipeline cannot go on with this (RuntimeError: Sizes of tensors"),
    (COSMOS, {"num_frames": 10}, "num_frames", "num_frames=10: the pipeline cannot go on with this (RuntimeError: "),
    (COGVIDEO, {"max_sequence_length": 600}, "max_sequence_length", "max_sequence_length=600: the pipeline cannot"),
    (FLUX2, {"latents": empty(1, 3, 5)}, "latents", "latents=<Tensor [1, 3, 5] float32>: the pipeline cannot go on"),
    (LTX2, {"timesteps": [500, 200]}, "timesteps", "timesteps=[500, 200]: the pipeline cannot go on with this"),
    (V2V, {"latents": empty(1, 3, 5)}, "latents", "float32>, video=[<RGB image of 16x16>, "),
    ("MarigoldDepthPipeline", {"latents": empty(1, 3, 5)}, "latents", "`generator` cannot be used together"),
    ("StableDiffusion3ControlNetPipeline", {"latents": empty(1, 3, 5)}, "latents", "hidden_states must be 4D"),
    (
        "HunyuanVideoImageToVideoPipeline",
        {"prompt": None, "prompt_embeds": empty(1, 4, 7)},
        "prompt",
        "prompt=None: the pipeline cannot go on with this (ValueError: You need to specify either `text`",
    ),
    ("IFSuperResolutionPipeline", {"prompt": None}, "prompt", "prompt=None, prompt_embeds=None: the pipeline cannot"),
    (LTX, {"frame_rate": 0}, "frame_rate", "frame_rate=0: the pipeline cannot go on with this (ZeroDivisionError: "),
    (CONTROL, GUIDED_FROM_END, "control_guidance_start", "control guidance start: 0.8 cannot be larger or equal to"),
    (CONTROL, {"control_guidance_end": 0.0}, "control_guidance_end", "control_guidance_end=0.0: control guidance"),
    (VACE, {"prompt": ["a", "b"]}, "prompt", "prompt=['a', 'b']: Passing a list of prompts is not yet supported"),
    (VACE, {"num_videos_per_prompt": 2}, "num_videos_per_prompt", "num_videos_per_prompt=2: Generating multiple"),
    (
        INPAINT,
        {"mask_image": Image.new("L", (32, 32)), "padding_mask_crop": 4, "output_type": "pil"},
        "mask_image",
        "mask_image=<L image of 32x32>: has no white pixel to crop around; paint some white, or leave",
    ),
    (LTX, {"generator": [torch.Generator()] * 2}, "generator", "a list of generators of length 2"),
    (LTX, {"latents": empty(1, 4, 3, 3)}, "latents", "latents=<Tensor [1, 4, 3, 3] float32>"),
]


@pytest.fixture(scope="module")
def drivers() -> dict[str, Driver]:
    """A runner for each pipeline, kept for all tests: a bad request leaves nothing behind."""
    return {}


def drive(drivers: dict[str, Driver], name: str) -> Driver:
    if name not in drivers:
        pipe = CASES[name].build()
        pipe.set_progress_bar_config(disable=True)
        drivers[name] = Driver(Runner.from_pipeline(pipe, config()))
    return drivers[name]


def asked(name: str, driver: Driver, **changes: Any) -> DiffusionRequest:
    arguments: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 4, **CASES[name].inputs(0), **changes}
    seed = None if "generator" in changes else 1
    return DiffusionRequest(request_id=f"r{len(driver.finished)}", seed=seed, **arguments)


def answer(driver: Driver, request: DiffusionRequest) -> RequestReport:
    return driver.drain([request])[request.request_id]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes", "field", "words"), BAD)
def test_the_argument_at_fault_is_named(
    drivers: dict[str, Driver], name: str, changes: dict[str, Any], field: str, words: str
) -> None:
    driver = drive(drivers, name)
    bad = asked(name, driver, **changes)
    with pytest.raises(Exception, match=r"."):  # the oracle: diffusers cannot do it either
        trial.run_alone(driver.runner.pipeline, bad)
    report = answer(driver, bad)
    assert report.step == 0
    assert report.error is not None
    assert report.error.kind == "InvalidRequest", report.error.traceback
    assert report.error.field == field
    assert words in report.error.message
    assert answer(driver, asked(name, driver)).error is None


@pytest.mark.parametrize(
    ("name", "noise_scheduler", "words"),
    [
        (
            QWEN,
            "FlowMatchHeunDiscreteScheduler",
            "no scheduler class of diffusers that goes with the model's FlowMatch",
        ),
        (
            "WanPipeline",
            {"class": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "`mu` must be passed",
        ),
        (SD, {"class": "DDIMScheduler", "prediction_type": "x"}, "prediction_type given as x must be one of"),
        ("AudioLDM2Pipeline", "BlockRefinementScheduler", "no scheduler class of diffusers that goes with the model's"),
        (LLADA, "DDIMScheduler", "no scheduler class of diffusers that goes with the model's BlockRefinementScheduler"),
        (SD, {"num_train_timesteps": -4}, "number of steps must be non-negative"),
    ],
)
def test_a_noise_scheduler_of_the_requests_own_is_at_fault_where_the_pipeline_cannot_use_it(
    drivers: dict[str, Driver], name: str, noise_scheduler: Any, words: str
) -> None:
    driver = drive(drivers, name)
    error = answer(driver, asked(name, driver, noise_scheduler=noise_scheduler)).error
    assert error is not None
    assert (error.kind, error.field) == ("InvalidRequest", "noise_scheduler"), error.traceback
    assert words in error.message
    assert answer(driver, asked(name, driver)).error is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"denoising_end": 0.2}, "denoising_end"), ({"sigmas": [1.0, 0.5], "strength": 0.4}, "sigmas"),
     ({"num_inference_steps": 2, "strength": None}, "num_inference_steps")],
)  # fmt: skip
def test_a_request_that_is_left_no_step_is_refused_and_not_answered_with_noise(
    drivers: dict[str, Driver], changes: dict[str, Any], field: str
) -> None:
    driver = drive(drivers, XL)
    request = asked(XL, driver, **changes)
    if request.params["strength"] is None:  # the pipeline's own is 0.3
        object.__setattr__(request, "params", {n: v for n, v in request.params.items() if n != "strength"})
    error = answer(driver, request).error
    assert error is not None
    assert (error.kind, error.field) == ("InvalidRequest", field)
    assert "leaves no step to take" in error.message


def test_what_the_prompt_says_is_no_evidence(drivers: dict[str, Driver]) -> None:
    driver = drive(drivers, SD)
    twice = asked(SD, driver, prompt="a guidance_scale", prompt_embeds=empty(1, 16, 32), guidance_scale=4.0)
    error = answer(driver, twice).error
    assert error is not None
    assert (error.kind, error.field) == ("InvalidRequest", "prompt")
    assert "guidance_scale=" not in error.message


def encode(prompt: str, negative_prompt: str, clip_skip: int) -> None:
    layers(prompt, negative_prompt, clip_skip)


def layers(*anything: Any) -> None:
    raise IndexError("list index out of range")


def test_a_text_is_not_held_to_be_at_fault_because_it_stands_beside() -> None:
    request = DiffusionRequest("a cat", negative_prompt="bad", clip_skip=2)
    try:
        encode("a cat", "bad", 2)
    except IndexError as error:
        info = blame.failure(error, request)
    assert info.field == "clip_skip"
    assert info.message.startswith("clip_skip=2: the pipeline cannot go on")


NO = "['a strength'] does not do"


def check_inputs(strength: float) -> None:
    raise ValueError(NO)


def test_a_line_that_has_all_arguments_checked_is_no_evidence_nor_is_a_list_of_prompts() -> None:
    try:
        strength = 0.5
        check_inputs(strength)
    except ValueError as error:
        info = blame.failure(error, DiffusionRequest(["a strength"], strength=0.5))
        assert (info.kind, info.field) == ("InvalidRequest", None)
    else:
        raise AssertionError


def test_what_is_missing_is_named_but_not_what_has_a_value_of_its_own() -> None:
    class Own(diffusers.StableDiffusion3Pipeline):
        def prepare_latents(
            self, *args: Any, num_images_per_prompt: int = 1, ip_adapter_image_embeds: Any = None
        ) -> Any:
            return num_images_per_prompt * ip_adapter_image_embeds

    pipe = tiny.sd3()
    pipe.__class__ = Own
    request = DiffusionRequest("a", request_id="r", width=16, height=16, num_inference_steps=1)
    error = answer(Driver(Runner.from_pipeline(pipe, config())), request).error
    assert error is not None
    assert error.message.startswith("ip_adapter_image_embeds=None: the pipeline cannot go on with this (TypeError: ")


class Broken:
    """A denoiser's forward that fails at its ``at``-th call, from 1."""

    def __init__(self, forward: Any, fault: Exception, at: int) -> None:
        self.forward, self.fault, self.at, self.calls = forward, fault, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls >= self.at:
            raise self.fault
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("fault", "at", "given"),
    [
        (RuntimeError("the weights are broken"), 1, True),
        (RuntimeError("shape mismatch"), 1, False),  # nothing was given that has one
        (RuntimeError("shape mismatch"), 2, True),  # the first step went well with it
        (torch.OutOfMemoryError("CUDA out of memory: tried to allocate a tensor of that size"), 1, True),
        (RuntimeError("cuDNN error: bad shape"), 1, True),
        (RuntimeError("mat1 and mat2 must have the same dtype, in any dimension"), 1, True),
    ],
)
def test_faults_of_the_model_and_of_the_device_are_not_held_against_a_request(
    fault: Exception, at: int, given: bool
) -> None:
    pipe = tiny.sd3()
    pipe.transformer.forward = Broken(pipe.transformer.forward, fault, at)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    size = {"height": 16, "width": 16, "num_inference_steps": 3}
    changes = {"latents": torch.ones(1, 4, 8, 8)} if given else {}
    error = answer(driver, DiffusionRequest("a", request_id="r", seed=1, output_type="latent", **size, **changes)).error
    assert error is not None
    assert error.kind == "GenerationFailed"
    assert str(fault) in error.message


def test_a_fault_that_cannot_say_what_it_is() -> None:
    class Speechless(ValueError):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    pipe = tiny.sd3()
    pipe.transformer.forward = Broken(pipe.transformer.forward, Speechless(), 1)
    request = DiffusionRequest("a", request_id="r", width=16, height=16, num_inference_steps=1)
    error = answer(Driver(Runner.from_pipeline(pipe, config())), request).error
    assert error is not None
    assert (error.kind, error.message) == ("GenerationFailed", "Speechless: (its message cannot be made)")


@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (pipelines.untyped, "silent_progress", None, "'NoneType' object is not callable"),  # called as the loop begins
        (pipelines.untyped, "silent_progress", torch.full, "argument 'size'"),
        (pipelines, "replacement", None, "'NoneType' object is not callable"),  # before the pipeline is
    ],
)
def test_a_fault_of_our_own_is_not_held_against_a_request(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, words: str
) -> None:
    driver = Driver(Runner.from_pipeline(tiny.sd3(), config()))
    monkeypatch.setattr(module, name, value)
    size = {"height": 16, "width": 16, "num_inference_steps": 3, "latents": torch.ones(1, 4, 8, 8)}
    request = DiffusionRequest("a", request_id="r", seed=1, noise_scheduler={"shift": 2.0}, **size)
    error = answer(driver, request).error
    assert error is not None
    assert error.kind == "GenerationFailed"
    assert error.message.startswith("TypeError: ")
    assert words in error.message


def test_a_fault_of_the_device_in_a_noise_scheduler_is_not_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate a tensor of that size")

    monkeypatch.setattr(diffusers.FlowMatchEulerDiscreteScheduler, "set_timesteps", full)
    request = DiffusionRequest("a", request_id="r", height=16, width=16, noise_scheduler={"shift": 2.0})
    error = answer(Driver(Runner.from_pipeline(tiny.sd3(), config())), request).error
    assert error is not None
    assert error.kind == "GenerationFailed"


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_the_field_is_told_across_processes_as_well(mp_engine: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^clip_skip=50: the pipeline cannot go on with this") as refused:
        await mp_engine.generate("a", clip_skip=50, num_inference_steps=1, height=16, width=16)
    assert refused.value.field == "clip_skip"
