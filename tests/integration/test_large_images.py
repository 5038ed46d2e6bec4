"""No more is made than the limits allow: not of a picture, not of latents, not by a pipeline's own choice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance.case import CASES
from conformance.pictures import picture
from diffusers import RePaintPipeline, RePaintScheduler, UNet2DModel

from steploom import AsyncDiffusionEngine, InvalidRequest


class Tried:
    """An engine over a tiny pipeline, and a request that it can do."""

    def __init__(self, engine: AsyncDiffusionEngine, usual: dict[str, Any], ran: list[str]) -> None:
        self.engine, self.usual, self.ran = engine, usual, ran

    async def make(self, *without: str, **changes: Any) -> Any:
        arguments: dict[str, Any] = {"output_type": "np", **self.usual, **changes, "seed": 1}
        return await self.engine.generate(**{name: arguments[name] for name in arguments if name not in without})

    async def refused(self, words: str, field: str, *without: str, **changes: Any) -> None:
        """It is refused with these words, and no module has run."""
        self.ran.clear()
        with pytest.raises(InvalidRequest, match=words) as caught:
            await self.make(*without, **changes)
        assert caught.value.field == field
        assert not self.ran


@asynccontextmanager
async def tried(name: str, **limits: float) -> AsyncIterator[Tried]:
    one = CASES[name]
    pipe, ran = one.build(), []
    encoder = getattr(pipe, "text_encoder", None) or pipe.vae
    encoder.register_forward_hook(lambda *_: ran.append("an encoder"))
    async with AsyncDiffusionEngine.from_pipeline(pipe, **limits) as engine:
        yield Tried(engine, {**one.inputs(0), str(one.steps_name): 2}, ran)


async def test_a_pipeline_that_brings_everything_to_an_area_of_its_own() -> None:
    async with tried("FluxKontextPipeline", max_pixels=32 * 32) as kontext:
        assert (await kontext.make()).images[0].shape == (32, 32, 3)
        of = "width=32, height=32: FluxKontextPipeline makes 1024x1024 of it, at most 1024 pixels"
        await kontext.refused(of, "width", "max_area")
        await kontext.refused("max_area=4096: at most 1024 pixels", "max_area", max_area=4096)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
async def test_a_pipeline_that_chooses_a_size_for_a_picture(name: str) -> None:
    async with tried(name, max_pixels=600 * 600) as edit:
        await edit.refused(f"image=.*32x32.*: {name} makes 1024x1024 of it", "image", "width", "height")


async def test_a_pipeline_whose_default_nobody_knows() -> None:
    async with tried("ZImagePipeline", max_pixels=32 * 32) as z_image:
        assert z_image.engine.info.default_size is None
        with pytest.raises(InvalidRequest, match="width=None, height=None: ZImagePipeline makes 1024x1024"):
            await z_image.make("width", "height")


@pytest.mark.parametrize(
    ("name", "side"), [("StableDiffusionUpscalePipeline", 32), ("StableDiffusionLatentUpscalePipeline", 64)]
)
async def test_upscalers_are_bound_by_what_they_make(name: str, side: int) -> None:
    async with tried(name, max_pixels=side * side) as upscaler:
        assert (await upscaler.make()).images[0].shape == (side, side, 3)
        large = picture(1, side // 2 + 8)
        await upscaler.refused(f"image: {name} makes {side + 16}x{side + 16} of {side // 2 + 8}x", "image", image=large)


@pytest.mark.slow
async def test_sizes_of_a_second_stage_and_of_processing() -> None:
    async with tried("VisualClozePipeline-upsampled", max_pixels=32 * 32) as cloze:
        said = "upsampling_width=32, upsampling_height=64: at most 1024"
        await cloze.refused(said, "upsampling_width", upsampling_height=64)
    async with tried("MarigoldDepthPipeline", max_pixels=32 * 32) as marigold:
        await marigold.refused("processing_resolution=64: at", "processing_resolution", processing_resolution=64)
        assert await marigold.make()


async def test_latents_are_as_large_as_the_image_of_them() -> None:
    async with tried("StableDiffusionPipeline", max_pixels=32 * 32) as text_to_image:
        assert (await text_to_image.make(latents=torch.randn(1, 4, 16, 16))).images[0].shape == (32, 32, 3)
        words = r"latents of \[1, 4, 16, 24\], which make 48x32: at most 1024"
        await text_to_image.refused(words, "latents", latents=torch.randn(1, 4, 16, 24))
    async with tried("StableDiffusionImg2ImgPipeline", max_pixels=32 * 32) as image_to_image:
        assert (await image_to_image.make(image=torch.randn(1, 4, 16, 16))).images[0].shape == (32, 32, 3)
        await image_to_image.refused("image: .* makes 48x32 of 24x16", "image", image=torch.randn(1, 4, 16, 24))


@pytest.mark.slow
async def test_a_default_that_gives_way_to_a_picture_refuses_nothing() -> None:
    async with tried("StableDiffusionControlNetPipeline", max_pixels=16 * 16) as control:
        assert control.engine.info.default_size == (32, 32)
        assert (await control.make(image=picture(1, 16))).images[0].shape == (16, 16, 3)
        await control.refused("32x32 is more than 256 pixels", "image")


async def test_frames_are_counted_where_they_are_given_and_where_they_are_not() -> None:
    async with tried("WanPipeline", max_frames=40) as wan:
        await wan.refused("num_frames=81: at most 40 frames", "num_frames", "num_frames")
    async with tried("WanVideoToVideoPipeline", max_frames=40) as again:
        frames = [picture(1, 16)] * 41
        await again.refused("video: 41 pictures, at most 40 of one request .*max_frames", "video", video=frames)
    async with tried("SanaVideoPipeline", max_frames=40) as sana:
        assert len((await sana.make(frames=5)).videos[0]) == 5
        await sana.refused("frames=41: at most 40 frames", "frames", frames=41)
        await sana.refused("frames=81: at most 40 frames", "frames", "frames")
        await sana.refused("frames='9': must be an integer", "frames", frames="9")


@pytest.mark.parametrize(
    ("name", "shape"), [("CogVideoXPipeline", (1, 30, 4, 2, 2)), ("HunyuanVideoPipeline", (1, 4, 30, 2, 2))]
)
async def test_latents_have_frames(name: str, shape: tuple[int, ...]) -> None:
    async with tried(name, max_frames=20) as video:
        await video.refused("latents of .*, which make 117 frames: at most 20", "latents", latents=torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "field"),
    [("HunyuanVideoFramepackPipeline", "latent_window_size"), ("HeliosPipeline", "num_latent_frames_per_chunk")],
)
async def test_windows_have_frames_also_where_nobody_asks_for_one(name: str, field: str) -> None:
    async with tried(name, max_frames=20) as video:
        assert len((await video.make()).videos) == 1
        await video.refused(f"{field}=30, which make 117 frames: at most 20", field, **{field: 30})
        words = f"{field}, as it is by default: {name} makes 33 frames at once, at most 20"
        with pytest.raises(InvalidRequest, match=words) as caught:
            await video.make(field)
        assert caught.value.field == field


@pytest.mark.parametrize("sampler", ["HeunDiscreteScheduler", "PNDMScheduler", "DDIMScheduler"])
async def test_steps_are_counted_as_they_are_asked_for(sampler: str) -> None:
    async with tried("StableDiffusionPipeline", max_steps=5) as images:
        kind = {"class": sampler} | ({"skip_prk_steps": False} if sampler == "PNDMScheduler" else {})
        output = await images.make(num_inference_steps=5, noise_scheduler=kind)
        assert output.timings.steps >= 5


async def test_steps_back_and_forth_are_counted() -> None:
    unet = UNet2DModel(
        block_out_channels=(8, 16), sample_size=32, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = RePaintPipeline(unet, RePaintScheduler())
    asked = {"image": picture(1, 32), "mask_image": picture(2, 32), "num_inference_steps": 5, "output_type": "np"}
    asked |= {"jump_length": 2, "seed": 1}
    async with AsyncDiffusionEngine.from_pipeline(pipe, max_steps=13) as engine:
        assert len((await engine.generate(jump_n_sample=2, **asked)).images) == 1
        with pytest.raises(
            InvalidRequest, match=r"jump_n_sample=3: RePaintPipeline takes 21 steps of it, at most 13 .*max_steps"
        ) as caught:
            await engine.generate(jump_n_sample=3, **asked)
        assert caught.value.field == "jump_n_sample"


async def test_the_size_that_follows_from_embeddings_is_bound() -> None:
    async with tried("StableCascadeDecoderPipeline", max_pixels=200 * 200) as decoder:
        assert len((await decoder.make()).images) == 1
        words = "StableCascadeDecoderPipeline makes 1704x1704 of it, at most 40000 pixels"
        with pytest.raises(InvalidRequest, match=words) as caught:
            await decoder.make(image_embeddings=torch.randn(1, 4, 40, 40))
        assert caught.value.field == "image_embeddings"


async def test_images_are_counted_by_the_latents_that_are_prepared() -> None:
    async with tried("StableDiffusionPipeline", max_images=4) as sd:
        latents = torch.randn(10, 4, 16, 16)
        with pytest.raises(InvalidRequest, match="StableDiffusionPipeline makes 10 of it, at most 4 images") as caught:
            await sd.make(latents=latents)
        assert caught.value.field == "latents"
        assert len((await sd.make(num_images_per_prompt=4)).images) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "without", "field"),
    [
        ("StableAudioPipeline", "audio_end_in_s", "audio_end_in_s"),
        ("AudioLDM2Pipeline", "audio_length_in_s", "audio_length_in_s"),
        ("AceStepPipeline", "audio_duration", "audio_duration"),
    ],
)
async def test_the_sound_that_is_made_by_default_is_counted(name: str, without: str, field: str) -> None:
    async with tried(name) as usual:
        seconds = usual.engine.info.default_sound_s
    assert seconds is not None
    async with tried(name, max_sound_s=0.99 * seconds) as less:
        with pytest.raises(InvalidRequest, match="seconds of sound of one request") as caught:
            await less.make(without)
        assert caught.value.field == field


@pytest.mark.parametrize(("name", "shape"), [("StableAudioPipeline", (1, 4, 400)), ("AceStepPipeline", (1, 4000, 8))])
async def test_sound_is_counted_by_the_latents_that_are_given(name: str, shape: tuple[int, ...]) -> None:
    async with tried(name, max_sound_s=4) as sound:
        assert sound.engine.info.latent_sound_s
        with pytest.raises(InvalidRequest, match="seconds of it, at most 4 seconds of sound") as caught:
            await sound.make(latents=torch.zeros(shape))
        assert caught.value.field == "latents"
