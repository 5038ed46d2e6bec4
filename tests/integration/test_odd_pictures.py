"""Odd pictures: what a pipeline takes it gets; what it fails on is told as the picture's fault, and hurts only it."""

from __future__ import annotations

import io
from typing import Any

import anyio
import conformance.families  # noqa: F401 - registers the cases
import diffusers
import numpy as np
import pytest
import tiny
import torch
from anyio import to_thread
from conformance import parts_sd
from conformance.case import CASES
from conformance.pictures import picture
from driving import distance, tensor_of
from PIL import Image

from steploom import AsyncDiffusionEngine, EngineConfig, GenerationFailed, InvalidRequest
from steploom.engine.checks.pictures import load_pictures
from steploom.engine.checks.validation import validate
from steploom.protocol.pictures import pictures_among
from steploom.worker.models import loading

CASES_TRIED = [
    ("StableDiffusionImg2ImgPipeline", "image"),
    ("StableDiffusionPipeline-ip-adapter", "ip_adapter_image"),
    *(
        pytest.param(name, argument, marks=pytest.mark.slow)
        for name, argument in (
            ("StableDiffusionInpaintPipeline", "image"),
            ("StableDiffusionInpaintPipeline", "mask_image"),
            ("StableDiffusionControlNetPipeline", "image"),
            ("StableVideoDiffusionPipeline", "image"),
            ("FluxKontextPipeline", "image"),
            ("Flux2Pipeline-image", "image"),
            ("QwenImageEditPipeline", "image"),
            ("QwenImageEditPlusPipeline", "image"),
            ("WanImageToVideoPipeline", "image"),
            ("WanVideoToVideoPipeline", "video"),
            ("VisualClozePipeline", "image"),
        )
    ),
]
LIMIT = 1100 * 1100


def sized(value: Any) -> int:
    """The side of the square pictures that a case gives."""
    while isinstance(value, list):
        value = value[0]
    return value.size[0]


def odd(side: int) -> dict[str, Any]:
    """Pictures that some pipelines take, and some do not."""
    whole = picture(1, side)
    array = np.asarray(whole).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    grey = whole.convert("L")
    return {
        "two": [whole, picture(2, side)],
        "three": [whole, picture(2, side), picture(3, side)],
        "two sizes": [whole, picture(2, 2 * side)],
        "PIL and array": [whole, array],
        "PIL and tensor": [whole, tensor],
        "None among them": [whole, None],
        "nothing but None": [None],
        "no channels": array[..., 0],
        "five channels": np.concatenate([array, array[..., :2]], axis=-1),
        "channels first": array.transpose(2, 0, 1),
        "a batch": array[None],
        "a tuple": (whole,),
        "a video": array[None, None],
        "tensor": tensor,
        "a tensor without channels": tensor[0],
        "a batch of tensors": tensor[None],
        "a video of tensors": tensor[None, None],
        "latents of another model": torch.rand(1, 16, side // 2, side // 2),
        "one pixel": Image.new("RGB", (1, 1)),
        "narrow": Image.new("RGB", (3, 1000)),
        "another size": picture(1, side + 8),
        "palette": whole.convert("P"),
        "grey": grey,
        "16 bits": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "floats": grey.convert("F"),
        "CMYK": whole.convert("CMYK"),
        "grey with alpha": whole.convert("LA"),
        "alpha": whole.convert("RGBA"),
        "black and white": whole.convert("1"),
        "animation": animation(side),
    }


def animation(side: int) -> Any:
    file = io.BytesIO()
    picture(1, side).save(file, "GIF", save_all=True, append_images=[picture(2, side)])
    return Image.open(file)


def no_pictures() -> dict[str, Any]:
    """What no pipeline takes: refused before any module runs."""
    ring: list[Any] = [picture(1)]
    ring.append(ring)
    return {
        "an object": object(), "a dict": {}, "a class": Image.Image, "a number": 3, "a ring": ring, "nothing": [[]],
        "one dimension": np.zeros(8, np.float32), "empty": np.zeros((0, 32, 32, 3), np.float32),
        "NaN": torch.full((3, 32, 32), torch.nan), "infinite": np.full((32, 32, 3), np.inf), "text": np.array([["a"]]),
        "complex": np.zeros((32, 32, 3), np.complex64), "HTML": b"<!doctype html>", "no bytes": b"", "folder": "/",
        "no file": "nowhere.png", "too large": Image.new("L", (1101, 1100)),
    }  # fmt: skip


async def alone(pipe: Any, arguments: dict[str, Any]) -> Any:
    """What ``pipe(...)`` gives, or what it raises."""

    def call() -> Any:
        try:
            return pipe(**arguments, generator=torch.Generator().manual_seed(7), output_type="latent")
        except Exception as error:  # noqa: BLE001 - whatever a pipeline raises at what it does not take
            return error

    return await to_thread.run_sync(call)


async def made(engine: AsyncDiffusionEngine, arguments: dict[str, Any]) -> Any:
    """What the engine gives, or what it raises."""
    others = {name: value for name, value in arguments.items() if name != "prompt"}
    try:
        return (await engine.generate(arguments.get("prompt"), **others, seed=7, output_type="latent")).output
    except (InvalidRequest, GenerationFailed) as error:
        return error


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "argument"), CASES_TRIED)
async def test_what_the_pipeline_takes_it_gets_and_what_it_fails_on_is_the_pictures_fault(
    name: str, argument: str
) -> None:
    one = CASES[name]
    pipe = one.build()
    pipe.set_progress_bar_config(disable=True)
    usual = {**one.inputs(0), str(one.steps_name): 2}
    encoded: list[str] = []
    encoder = getattr(pipe, "text_encoder", None) or pipe.vae
    hook = encoder.register_forward_hook(lambda *_: encoded.append("ran"))
    taken = 0
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_pixels=LIMIT) as engine:
        for said, value in {**odd(sized(usual[argument])), "as usual": usual[argument]}.items():
            arguments = usual | {argument: value}
            expected = await alone(pipe, arguments)
            found = await made(engine, arguments)
            if isinstance(expected, Exception):
                assert isinstance(found, InvalidRequest), (said, expected, found)
                assert found.field == argument, (said, found)
                assert str(found).startswith(f"{argument}="), (said, found)
            else:
                taken += 1
                assert not isinstance(found, Exception), (said, found)
                assert torch.allclose(tensor_of(found), tensor_of(expected), rtol=1e-3, atol=1e-4), said
        assert taken >= 1
        encoded.clear()
        for said, value in no_pictures().items():
            found = await made(engine, usual | {argument: value})
            assert isinstance(found, InvalidRequest), (said, found)
            assert found.field == argument, (said, found)
        assert not encoded, "before any work"
    hook.remove()


async def test_a_neighbour_with_an_odd_picture_hurts_nobody() -> None:
    one = CASES["StableDiffusionImg2ImgPipeline"]
    pipe = one.build()
    usual = {**one.inputs(0), "num_inference_steps": 6}
    expected = await alone(pipe, usual)
    results: dict[str, Any] = {}
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine, anyio.create_task_group() as group:

        async def run(said: str, arguments: dict[str, Any]) -> None:
            results[said] = await made(engine, arguments)

        group.start_soon(run, "usual", usual)
        for said in ("two", "grey", "five channels", "PIL and array"):
            group.start_soon(run, said, usual | {"image": odd(32)[said]})
    assert distance(results.pop("usual"), expected) < 1e-4
    assert {type(error) for error in results.values()} == {InvalidRequest}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("two", r"image=\[<RGB image of 32x32>, <RGB .*>\]: 2 pictures for 1 prompt; send one, or as many as"),
        (
            "grey",
            r"image=<L image of 32x32>: is of mode L; convert it: image.convert\('RGB'\) \(StableDiffusionImg2Img",
        ),
        ("five channels", r"image=<ndarray \[32, 32, 5\] float32>: has 5 channels; give \[height, width, 3\]"),
        ("latents of another model", r"has 16 channels; give \[3, height, width\]"),
        ("None among them", "1 of 2 are None; leave them out"),
        ("PIL and tensor", "holds PIL images and tensors; give them all as PIL images"),
        ("one pixel", "is of 1x1 pixels; make it larger"),
    ],
)
async def test_the_message_says_what_is_odd_and_the_mend(said: str, words: str) -> None:
    one = CASES["StableDiffusionImg2ImgPipeline"]
    async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
        with pytest.raises(InvalidRequest, match=words):
            await engine.generate(**{**one.inputs(0), "image": odd(32)[said]})


async def test_a_mask_that_is_not_of_the_images_size() -> None:
    """Where the pipeline brings both to one size it is taken; where it lays one over the other, it is not."""
    one = CASES["StableDiffusionInpaintPipeline"]
    usual = {**one.inputs(0), "num_inference_steps": 2, "output_type": "pil"}
    large = usual | {"mask_image": usual["mask_image"].resize((64, 64))}
    async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
        assert (await engine.generate(**large)).images
        with pytest.raises(InvalidRequest, match=r"mask_image=.*: is of 64x64, but image of 32x32; make them equal"):
            await engine.generate(**large, padding_mask_crop=4)
        assert (await engine.generate(**usual, padding_mask_crop=4)).images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argument", "before"),
    [
        ("StableDiffusionPipeline-ip-adapter", "ip_adapter_image", False),
        ("WanVideoToVideoPipeline", "video", False),
        ("VisualClozePipeline", "image", True),
        ("QwenImageEditPipeline", "image", True),
    ],
)
async def test_a_picture_that_is_missing(name: str, argument: str, before: bool) -> None:
    one = CASES[name]
    usual = {**one.inputs(0), str(one.steps_name): 2}
    for given in (usual | {argument: None}, {key: usual[key] for key in usual if key != argument}):
        async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
            found = await made(engine, given)
        assert isinstance(found, InvalidRequest), found
        assert found.field == argument
        assert ("requires it" in str(found)) <= before


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("WanVideoToVideoPipeline", 3, "3 pictures for 2 prompts; send one, or as many"),
        ("QwenImageEditPipeline", 2, "is not what it takes; give what the pipeline's documentation shows"),
    ],
)
async def test_pictures_for_several_prompts(name: str, count: int, words: str) -> None:
    one = CASES[name]
    argument = "video" if name.startswith("Wan") else "image"
    usual = {**one.inputs(0), str(one.steps_name): 2}
    several = usual | {"prompt": [usual["prompt"], "a cat"], argument: [usual[argument]] * count}
    async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
        with pytest.raises(InvalidRequest, match=words) as caught:
            await engine.generate(**several)
    assert caught.value.field == argument


async def test_a_fault_of_other_arguments_is_not_the_pictures() -> None:
    one = CASES["StableDiffusionImg2ImgPipeline"]
    usual = {**one.inputs(0), "num_inference_steps": 2}
    async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
        found = await made(engine, usual | {"strength": 1.5})
        assert isinstance(found, InvalidRequest)
        assert found.field != "image"
        embeds = {"prompt": None, "prompt_embeds": torch.rand(1, 7, 5), "negative_prompt_embeds": torch.rand(1, 7, 5)}
        found = await made(engine, usual | embeds)
        assert isinstance(found, InvalidRequest)
        assert found.field == "negative_prompt_embeds"


async def test_a_fault_of_a_later_step_is_not_the_pictures() -> None:
    """Nor is one of the caller's own; the picture is of a mode that this pipeline takes, and others do not."""
    one = CASES["StableDiffusionImg2ImgPipeline"]
    usual = {**one.inputs(0), "image": picture(1).convert("CMYK"), "num_inference_steps": 6}

    def interfere(_pipe: Any, step: int, _timestep: Any, values: Any) -> Any:
        if step == 2:
            raise ValueError("the image is not to my liking")
        return values

    async with AsyncDiffusionEngine.from_pipeline(one.build()) as engine:
        assert isinstance(await made(engine, usual | {"callback_on_step_end": interfere}), GenerationFailed)


def broken(*_: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_a_fault_of_the_machine_is_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    one = CASES["StableDiffusionImg2ImgPipeline"]
    pipe = one.build()
    hook = pipe.vae.encoder.register_forward_pre_hook(broken)
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        found = await made(engine, {**one.inputs(0), "image": [picture(1), picture(2)], "num_inference_steps": 2})
        assert isinstance(found, GenerationFailed)
    hook.remove()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_that_the_conformance_suite_gives_is_refused() -> None:
    """Neither as a picture nor as too much; of every class, family and kind."""
    limits, pictures = EngineConfig(), 0
    for one in CASES.values():
        info = loading.describe(one.build(), in_process=True)
        for i in range(3):
            request = one.request(i)
            read = await load_pictures(request, info, limits.max_pixels)
            validate(read, info, limits)
            pictures += len(pictures_among(request.params, info))
    assert pictures > 100


async def test_pictures_for_several_control_nets_are_not_to_blame_for_another_argument() -> None:
    nets = [parts_sd.controlnet(), parts_sd.controlnet()]
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts_sd.parts(parts_sd.ddim()), controlnet=nets)
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "image": [picture(1), picture(2)]}
    async with AsyncDiffusionEngine.from_pipeline(pipe) as engine:
        with pytest.raises(InvalidRequest, match=r"start: 0.8 cannot be larger or equal to .* end: 0.2") as caught:
            await engine.generate("a", control_guidance_start=0.8, control_guidance_end=0.2, **given)
        assert caught.value.field == "control_guidance_start"
        assert (await engine.generate("a", **given)).output[0].isfinite().all()


async def test_a_picture_that_would_be_left_out_in_silence_is_refused() -> None:
    async with AsyncDiffusionEngine.from_pipeline(tiny.sd3()) as engine:
        with pytest.raises(InvalidRequest) as caught:
            await engine.generate("a", ip_adapter_image=picture(1))
        assert caught.value.field == "ip_adapter_image"
