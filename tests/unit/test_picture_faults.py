"""Which picture a pipeline's error is blamed on, and when on none; raised by diffusers' own preprocessing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from steploom import DiffusionRequest
from steploom.protocol import Parameter, PipelineInfo
from steploom.worker.blame.picture_faults import of_pictures

NAMES = ("image", "mask_image", "video", "ip_adapter_image")
INFO = PipelineInfo(
    pipeline_class="P",
    parameters=[*(Parameter(name, kind="picture") for name in NAMES), Parameter("prompt"), Parameter("height")],
)
SMALL, LARGE = Image.new("RGB", (32, 32)), Image.new("RGB", (64, 64))
DEEP = Image.new("I;16", (32, 32), 40000)
GREY = SMALL.convert("L")


def raised(error: Exception) -> Exception:
    """With a traceback that leads nowhere near pictures."""
    try:
        raise error
    except Exception as caught:  # noqa: BLE001 - what was given
        return caught


def preprocessing(image: Any, factor: int = 8) -> Exception:
    """What diffusers raises at it."""
    with pytest.raises(Exception) as caught:
        VaeImageProcessor(vae_scale_factor=factor).preprocess(image)
    return caught.value


def blamed(
    error: Exception, prompt: Any = "a", steps: int = 0, module: str | None = None, **params: Any
) -> tuple[str, str] | None:
    """Field and message."""
    found = of_pictures(error, DiffusionRequest(prompt, **params), INFO, steps=steps, module=module)
    return None if found is None else (str(found.field), str(found))


SHAPES = RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")


@pytest.mark.parametrize(
    ("params", "prompt", "words"),
    [
        ({"image": [SMALL, LARGE]}, ["a", "b"], "are of different sizes, 32x32 and 64x64; make them equal"),
        ({"image": [SMALL, SMALL, SMALL]}, ["a", "b"], "3 pictures for 2 prompts; send one, or as many"),
        ({"image": np.zeros((2, 32, 32, 3))}, "a", "2 pictures for 1 prompt"),
        ({"image": np.zeros((1, 1, 32, 32, 3))}, "a", r"is 5-dimensional; give \[height, width, 3\]"),
        ({"image": torch.zeros(1, 1, 3, 32, 32)}, "a", r"is 5-dimensional; give \[3, height, width\]"),
        ({"image": np.zeros((32, 32))}, "a", "has no channels"),
        ({"image": SMALL, "mask_image": LARGE}, "a", "mask_image=.* is of 64x64, but image of 32x32; make them"),
        ({"mask_image": np.zeros((32, 32, 3))}, "a", r"has 3 channels; give \[height, width\]"),
        ({"mask_image": SMALL.convert("P")}, "a", r"is of mode P; convert it: image.convert\('L'\)"),
        ({"image": DEEP}, "a", r"is of mode I;16; convert it: Image.fromarray\(\(numpy.asarray\(image\) // 257\)"),
        ({"image": Image.new("I;16", (32, 32), 255)}, "a", r"is of mode I;16; convert it: image.convert\('RGB'\)"),
        ({"video": [[SMALL]] * 3}, ["a", "b"], "3 pictures for 2 prompts"),
        ({"video": torch.zeros(3, 4, 3, 32, 32)}, ["a", "b"], "3 pictures for 2 prompts"),
    ],
)
def test_what_is_odd_is_said_at_the_first_step(params: dict[str, Any], prompt: Any, words: str) -> None:
    for steps in (0, 1):
        found = blamed(raised(SHAPES), prompt, steps, **params)
        assert found is not None
        with pytest.raises(ValueError, match=words):
            raise ValueError(found[1])
    assert blamed(raised(SHAPES), prompt, 2, **params) is None, "it would have failed before"


@pytest.mark.parametrize(
    "params",
    [
        {"image": SMALL}, {"image": [SMALL, SMALL], "prompt": None}, {"image": SMALL, "mask_image": GREY},
        {"image": np.zeros((32, 32, 3))}, {"mask_image": np.zeros((32, 32))}, {"video": [SMALL] * 9},
        {"video": torch.zeros(1, 9, 3, 32, 32)}, {},
    ],
)  # fmt: skip
def test_where_nothing_is_odd_nothing_is_blamed(params: dict[str, Any]) -> None:
    assert blamed(raised(SHAPES), **params) is None


def test_the_picture_that_was_being_preprocessed_is_blamed_and_no_other() -> None:
    mask = (GREY,)
    field, message = blamed(preprocessing(mask), image=GREY, mask_image=mask) or ("", "")
    assert (field, "is a tuple; give a list" in message) == ("mask_image", True)
    strange = [torch.zeros(1, 32, 32), torch.zeros(1, 16, 32)]
    assert (blamed(preprocessing(strange), image=GREY, mask_image=strange) or "")[0] == "mask_image"


def test_what_preprocessing_fails_on_is_blamed_if_nothing_is_odd_about_it() -> None:
    nested = [[SMALL]]
    error = preprocessing(nested)
    assert (blamed(error, image=nested) or "")[0] == "image"
    assert "documentation shows" in (blamed(error, image=nested) or ("", ""))[1]
    nothing_left = preprocessing(SMALL, factor=64)
    assert "image" not in str(nothing_left)
    assert (blamed(nothing_left, image=SMALL) or "")[0] == "image"
    plain = IndexError("tuple index out of range")
    assert blamed(raised(plain), image=nested) is None
    assert "is no PIL image; give one" in (blamed(raised(plain), image=np.zeros((32, 32, 3))) or ("", ""))[1]
    assert (
        "is no PIL image; give one" in (blamed(preprocessing(torch.zeros(())), image=torch.zeros(3, 32, 32)) or "")[1]
    )


@pytest.mark.parametrize("margin", [4, 16])
def test_a_mask_without_white_is_blamed_for_what_cannot_be_cut_out_around_it(margin: int) -> None:
    processor, black = VaeImageProcessor(do_convert_grayscale=True), Image.new("L", (32, 32))
    with pytest.raises((ValueError, ZeroDivisionError)) as caught:
        processor.preprocess(SMALL, crops_coords=processor.get_crop_region(black, 32, 32, pad=margin))
    field, message = blamed(caught.value, image=SMALL, mask_image=[GREY, black]) or ("", "")
    assert field == "mask_image"
    assert "has no white pixel to crop around; paint some white, or leave padding_mask_crop out" in message
    white = Image.new("L", (32, 32), 255)
    assert (blamed(caught.value, image=SMALL, mask_image=white) or "")[0] == "image"
    assert (blamed(preprocessing(SMALL, factor=64), image=SMALL, mask_image=black) or "")[0] == "image"


def test_what_encodes_pictures_fails_on_them() -> None:
    error = raised(ValueError("not enough values to unpack"))
    assert (blamed(error, module="image_encoder", image=SMALL) or "")[0] == "image"
    assert blamed(error, module="text_encoder", image=SMALL) is None
    assert (blamed(raised(RuntimeError("expected input to have 3 channels")), module="vae", image=SMALL) or "")[0]
    assert blamed(raised(RuntimeError("an odd fault")), module="vae", image=SMALL) is None, "which may be the module's"
    assert blamed(error, module="vae", steps=1, image=SMALL) is None, "which decodes by now"


def test_an_error_that_names_another_argument_is_not_the_pictures() -> None:
    assert blamed(raised(ValueError("`height` has to be divisible by 8")), image=GREY) is None
    assert (blamed(raised(ValueError("`mask_image` is wrong")), image=GREY, mask_image=GREY) or "")[0] == "mask_image"
    missing = ValueError("'mask_image' is needed beside 'image'")
    assert (blamed(raised(missing), image=SMALL) or "")[0] == "image", "of those that are given"
    assert (blamed(raised(TypeError("object of type 'Image' has no len()")), image=SMALL) or "")[0] == "image"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: device-side assert"), MemoryError(), OSError("no space"), SystemExit(1),
        KeyboardInterrupt(),
    ],
)  # fmt: skip
def test_what_is_the_machines_fault_is_nobody_elses(error: Any) -> None:
    found = of_pictures(error, DiffusionRequest("a", image=GREY), INFO, steps=0, module="vae")
    assert found is None


def test_a_missing_picture_is_known_by_what_misses_it() -> None:
    none = raised(TypeError("argument of type 'NoneType' is not iterable"))
    assert (blamed(none, module="unet") or "")[0] == "ip_adapter_image"
    assert (blamed(raised(ValueError("requires the keyword argument `image_embeds`"))) or "")[0] == "ip_adapter_image"
    assert (blamed(none) or "")[0] == "image"
    assert (blamed(preprocessing(None)) or "")[0] == "image"
    assert blamed(none, prompt=None) is None
    assert blamed(none, steps=1) is None
    assert blamed(raised(SHAPES)) is None
