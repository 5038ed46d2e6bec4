"""What the engine takes as a picture, and what it makes of it before a request is queued."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steploom import DiffusionRequest, InvalidRequest
from steploom.engine.checks.picture_checks import check_pictures
from steploom.engine.checks.pictures import load_pictures
from steploom.protocol import Parameter, PipelineInfo
from steploom.protocol.pictures import named_as_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
LIMIT = 64 * 64
NAMES = ("image", "mask_image", "control_image", "ip_adapter_image", "last_image", "video")
ANY = PipelineInfo(pipeline_class="P")
INFO = PipelineInfo(pipeline_class="P", parameters=[Parameter(name, kind="picture") for name in NAMES])


def encoded(picture: Any = None, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(PIXELS) if picture is None else picture).save(file, form, **options)
    return file.getvalue()


async def loaded(value: Any, name: str = "image", info: PipelineInfo = INFO) -> Any:
    request = await load_pictures(DiffusionRequest("x", **{name: value}), info, LIMIT)
    check_pictures(request, info, LIMIT)
    return request.params[name]


@pytest.mark.parametrize("name", NAMES)
async def test_bytes_and_files_become_pictures(name: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(encoded())
    with file.open("rb") as opened:
        for given in (encoded(), bytearray(encoded()), file, str(file), io.BytesIO(encoded()), opened):
            picture = await loaded(given, name)
            assert picture.mode == "RGB"
            assert (np.asarray(picture) == PIXELS).all()
    several = await loaded([encoded(), file, [Image.fromarray(PIXELS)]], name)
    assert all((np.asarray(one) == PIXELS).all() for one in (several[0], several[1], several[2][0]))


DEEP = np.arange(24 * 32).reshape(24, 32) * 85
"""Grey values of 16 bits."""


@pytest.mark.parametrize(
    ("picture", "form"),
    [
        (Image.fromarray(DEEP.astype(np.uint16)), "PNG"), (Image.fromarray(DEEP.astype(np.uint16)), "TIFF"),
        (Image.fromarray(DEEP.astype(np.int32)), "TIFF"), (Image.fromarray((DEEP / 65195).astype(np.float32)), "TIFF"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["image", "mask_image"])
async def test_16_bits_are_refused_with_a_conversion_that_keeps_them(picture: Any, form: str, name: str) -> None:
    """What the message says is done here, and nothing is lost but the lower bits."""
    with pytest.raises(InvalidRequest, match=f"^{name}: an image of mode .*give 8 bits: ") as caught:
        await loaded(encoded(picture, form), name)
    mend = str(caught.value).partition("give 8 bits: ")[2]
    found = eval(mend, {"Image": Image, "numpy": np, "image": picture})
    assert found.mode == ("L" if name == "mask_image" else "RGB")
    grey = np.asarray(found.convert("L"), float)
    assert np.abs(grey - DEEP / 65195 * 255).max() < 3
    assert len(np.unique(grey)) > 200


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
async def test_8_bits_in_a_deep_image_are_read(dtype: Any) -> None:
    """As ``load_image`` does: nothing of them is cut off."""
    grey = PIXELS[..., 0]
    assert (np.asarray(await loaded(encoded(Image.fromarray(grey.astype(dtype)), "TIFF")))[..., 1] == grey).all()


async def test_what_is_a_picture_already_passes_as_it_is() -> None:
    for given in (Image.fromarray(PIXELS), PIXELS.astype(np.float32) / 255, [np.zeros((1, 8, 8, 3), np.float32)], None):
        request = DiffusionRequest("x", image=given)
        assert await load_pictures(request, INFO, LIMIT) is request
        check_pictures(request, INFO, LIMIT)


async def test_arrays_of_bytes_become_pictures_since_diffusers_takes_arrays_to_be_scaled() -> None:
    assert (np.asarray(await loaded(PIXELS)) == PIXELS).all()
    assert [np.asarray(one).shape for one in await loaded(np.stack([PIXELS] * 2))] == [PIXELS.shape] * 2
    grey = await loaded(PIXELS[..., :1], "mask_image")
    assert (np.asarray(grey.convert("L")) == PIXELS[..., 0]).all()


async def test_a_file_is_read_as_diffusers_reads_it() -> None:
    from diffusers.utils import load_image

    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    for picture in (Image.fromarray(PIXELS).convert("RGBA"), Image.fromarray(PIXELS).convert("L"), None):
        given = encoded(picture, exif=turned)
        assert (await loaded(given)).tobytes() == load_image(Image.open(io.BytesIO(given))).tobytes()
    assert (await loaded(encoded(exif=turned))).size == (24, 32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no image", "cannot be read .*8 bytes.*no file of an image.*; give one that is whole"),
        (b"", "is empty; give a PIL image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG has to be drawn first"),
        (b"\0\0\0\x20ftypisom" + bytes(99), "a video taken apart into frames"),
        (encoded()[:200], "cannot be read"),
        ("missing.png", "image='missing.png': there is no such file; give a PIL image, an array, the bytes"),
        (pathlib.Path("missing.png"), "missing.png.*: there is no such file"),
        ("", "image='': is empty; give a PIL image"),
        (".", "image='.': is a folder; give the path of one file"),
        ("x" * 9000, "no such file"),
        ("https://example.org/cat.png", "no path of a file; fetch it yourself and give its bytes"),
        ("data:image/png;base64,AAAA", "no path of a file; decode it yourself"),
        (encoded(Image.new("RGB", (65, 64))), "65x64 is more than 4096 pixels .*max_pixels.*; make it smaller"),
        (Image.new("RGB", (65, 64)), "65x64 is more than 4096 pixels"),
        ([Image.new("RGB", (8, 8)), np.zeros((65, 64, 3), np.float32)], "64x65 is more"),
        (np.zeros((2, 65, 64, 3), np.uint8), "64x65 is more"),
        (np.zeros((0, 8, 3), np.float32), "has no pixels"),
        ([], "is empty"),
        ([[], []], "is empty"),
        ({}, "is no picture"),
        ({"a": Image.new("RGB", (8, 8))}, "is no picture"),
        (object(), "image=<object>: is no picture; give a PIL image, an array, the bytes"),
        ([Image.new("RGB", (8, 8)), print], "is no picture"),
        (Image.Image, "is no picture"),
        (True, "image=True: is no picture"),
        (range(3), "is no picture"),
        (3.5, "is no picture"),
        (np.zeros(8, np.float32), r"ndarray \[8\] float32>: is 1-dimensional; give \[height, width, channels\]"),
        (np.zeros(8, np.uint8), "is 1-dimensional"),
        (np.float32(1), "is no picture|is 0-dimensional"),
        (np.zeros((1, 1, 1, 8, 8, 3), np.float32), "is 6-dimensional"),
        (np.zeros((0, 8, 8, 3), np.float32), "has no pixels"),
        (np.zeros((8, 8, 0), np.float32), "has no pixels"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.full((8, 8, 3), np.nan, np.float32), "its values go from nan to nan; give finite ones"),
        ([PIXELS, np.array([[0.0, np.inf]])], "its values go from 0.0 to inf; give finite ones"),
        (np.zeros((8, 8, 3), np.complex64), "an array of complex64 is no picture"),
        (np.array([["a", "b"]]), "is no picture"),
        (np.zeros((5000, 5000, 5), np.float32), "5000x5000 is more"),
        ([[0.5, 0.5]], "is no picture"),
        (np.zeros((8, 8, 3), np.uint16), "an array of uint16 is no picture; give uint8"),
    ],
)
async def test_what_cannot_be_a_picture_is_refused_with_field_value_and_mend(value: Any, message: str) -> None:
    for name in ("image", "mask_image"):
        with pytest.raises(InvalidRequest, match=message.replace("image=", f"{name}=")) as caught:
            await loaded(value, name)
        assert caught.value.field == name


def test_tensors_have_their_channels_first() -> None:
    torch = pytest.importorskip("torch")
    check_pictures(DiffusionRequest("x", image=torch.zeros(3, 64, 64)), INFO, LIMIT)
    check_pictures(DiffusionRequest("x", image=torch.zeros(1, 4, 64, 4)), INFO, LIMIT)
    with pytest.raises(InvalidRequest, match="64x65"):
        check_pictures(DiffusionRequest("x", image=[torch.zeros(3, 65, 64)]), INFO, LIMIT)


async def test_only_pictures_are_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(encoded())
    given = {"prompt_2": str(file), "prompt_embeds_mask": [1, 0], "image_embeds": [0.5], "num_frames": 9, "crops": [3]}
    request = DiffusionRequest("x", **given)
    assert await load_pictures(request, ANY, LIMIT) is request
    check_pictures(request, ANY, LIMIT)


def test_picture_arguments_are_known_by_name() -> None:
    pictures = "image images mask_image mask control_image ip_adapter_image negative_ip_adapter_image last_image video "
    pictures += (
        "mask_video control_video frames control_mask original_image reference_images image_reference pose_video"
    )
    others = (
        "num_images_per_prompt num_frames image_embeds ip_adapter_image_embeds prompt_attention_mask attention_mask "
    )
    others += "prompt_embeds_mask prompt_embeds_mask_2 padding_mask_crop masked_image_latents image_latents frame_rate "
    others += "use_intersect_mask atom37_mask image_guidance_scale keep_first_frame control_video_latents padding_mask "
    others += "strength"
    assert [name for name in pictures.split() if not named_as_picture(name)] == []
    assert [name for name in others.split() if named_as_picture(name)] == []


@pytest.mark.parametrize("kind", ["array", "tensor"])
async def test_masks_of_truth_values_or_of_ones_are_black_and_white(kind: str) -> None:
    torch = pytest.importorskip("torch")
    truth = PIXELS[..., 0] > 128
    for mask in (truth, truth.astype(np.uint8), truth.astype(np.uint8) * 255, truth[None, :, :, None]):
        given = torch.from_numpy(mask) if kind == "tensor" else mask
        made = await loaded(given, "mask_image")
        (made,) = made if isinstance(made, list) else [made]
        assert (np.asarray(made.convert("L")) == truth * 255).all()
    dark = np.ones((8, 8, 3), np.uint8)
    assert np.asarray(await loaded(dark)).max() == 1, "an image is no mask"


async def test_tensors_of_bytes_become_pictures_wherever_their_channels_are() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(PIXELS)
    for given in (tensor, tensor.permute(2, 0, 1)):
        assert (np.asarray(await loaded(given)) == PIXELS).all()
    (one,) = await loaded(tensor.permute(2, 0, 1)[None])
    assert (np.asarray(one) == PIXELS).all()


async def test_lists_that_hold_themselves_or_never_end_are_refused() -> None:
    deep: Any = Image.fromarray(PIXELS)
    for _ in range(2000):
        deep = [deep]
    ring: list[Any] = [Image.fromarray(PIXELS)]
    ring.append(ring)
    for given in (deep, ring):
        for name in ("image", "cross_attention_kwargs"):
            with pytest.raises(InvalidRequest, match=f"{name}: lists nested more than 8 deep") as caught:
                await loaded(given, name)
            assert caught.value.field == name


async def test_batches_of_lists_of_pictures_are_not_too_deep() -> None:
    given: Any = Image.fromarray(PIXELS)
    for _ in range(8):
        given = [given]
    assert await loaded(given)
    with pytest.raises(InvalidRequest, match="8 deep"):
        await loaded([given])


async def test_tensors_without_pixels_are_refused() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.rand(3, 8, 8)
    for given in (whole.to("meta"), whole.to_sparse()):
        with pytest.raises(InvalidRequest, match=r"Tensor \[3, 8, 8\] .*give a dense tensor"):
            await loaded(given)
    whole[0, 0, 0] = float("nan")
    for given in (whole, whole.half(), whole.bfloat16(), whole.clone().requires_grad_(), [whole[None]]):
        with pytest.raises(InvalidRequest, match="give finite ones"):
            await loaded(given)


async def test_where_annotations_say_little_only_what_is_no_picture_for_sure_is_refused() -> None:
    unknown = object()
    for given in (unknown, {"a": unknown}, np.zeros(8, np.float32), [None], True):
        assert await loaded(given, info=ANY) is given
    for given in (3.5, np.zeros((0, 8, 3)), np.zeros((8, 8, 3), np.int64), np.full((8, 8), np.nan), b"x", "missing"):
        with pytest.raises(InvalidRequest, match=r"^image"):
            await loaded(given, info=ANY)


async def test_what_is_named_like_a_picture_and_is_none_passes() -> None:
    info = PipelineInfo(
        pipeline_class="P",
        parameters=[Parameter("frames", kind="number"), Parameter("input_images_mask", kind="other")],
    )
    assert await loaded(9, "frames", info) == 9
    assert await loaded([1, 0], "input_images_mask", info) == [1, 0]
    sound = PipelineInfo(pipeline_class="P", parameters=[Parameter("mask")], makes=["audios"])
    mask = np.zeros((1, 1, 80), bool)
    assert await loaded(mask, "mask", sound) is mask


async def test_what_an_image_encoder_preprocesses_stays_an_array() -> None:
    """It scales by the dtype, and of four dimensions it makes one adapter's several pictures."""
    for given in (PIXELS, np.stack([PIXELS] * 2), PIXELS.astype(np.int64)):
        assert await loaded(given, "ip_adapter_image") is given


async def test_videos_of_bytes_become_lists_of_pictures() -> None:
    (video,) = await loaded(np.stack([PIXELS] * 3)[None], "video")
    assert [np.asarray(frame).shape for frame in video] == [PIXELS.shape] * 3


async def test_an_animation_is_its_first_picture_but_no_video() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS // 2)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (await loaded(animation)).size == (32, 24)
    with pytest.raises(InvalidRequest, match="video: an animation of 2 frames; give them as a list"):
        await loaded(animation, "video")
