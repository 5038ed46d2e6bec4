"""What to ask of a pipeline of which only the arguments are known: small, short requests, until it takes one.

Pipelines do not say which pictures they need, how small an image or how short a video may be, nor which kinds of output
they have. So they are asked, alone: the first way that works is the one in which they are tried.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from steploom.errors import GenerationFailed, InvalidRequest
from steploom.requests import DiffusionRequest
from steploom.weave import signatures
from steploom.worker.models import loading
from steploom.worker.traits import lengths
from steploom.worker.trials import trial

SMALL, SMALL_VIDEO = 32, 16
"""Latents along a side of what is asked for at first; 32 are 256 pixels with most VAEs."""

_SMALLER = (64, 32, 16)
_SHORT: Mapping[str, Any] = {
    "num_frames": 9, "video_length": 4, "audio_length_in_s": 1.0, "audio_end_in_s": 1.0, "audio_duration": 2.0,
    "gen_length": 32, "max_new_tokens": 8, "max_sequence_length": 64,
}  # fmt: skip
"""Lengths by argument: 9 frames are a multiple of 4 and of 8, plus one."""

_KINDS = ("latent", "pt", "np")
"""Of output, the best to compare first: pixels are rounded, and latents are not decoded."""

_PICTURES: Sequence[tuple[str, ...]] = (
    (), ("image",), ("image", "mask_image"), ("control_image",), ("control_image", "control_mode"),
    ("image", "control_image"), ("task_prompt", "content_prompt", "image"),
    ("image", "mask_image", "control_image"), ("video",), ("conditioning_frames",),
    ("image", "mask_image", "control_image", "video", "conditioning_frames"),
)  # fmt: skip
"""Pictures, and what goes with them, that are given besides what must be."""

_DRAWN = ("class_labels",)
"""Arguments in whose absence a pipeline draws from the global generator, so that it does not repeat."""

_WIDTHS = ("encoder_hid_dim", "clip_image_in_channels", "cross_attention_dim", "embedding_dim", "caption_channels")
"""Where a denoiser's configuration says how wide the embeddings are that it takes."""

_SHARE = 0.8
"""Of the steps, that are taken of a picture."""

_PIXELS_PER_LATENT = 8
"""Along a side, of most VAEs."""

_TOLD = 3
"""Different errors that are told when nothing works."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user says of the requests.

    Attributes:
        steps: Of the first request; the second has one more.
        size: Pixels along a side; None lets it be chosen.
        prompts: One for each request.
        extra: Further arguments of both.
    """

    steps: int
    size: int | None
    prompts: Sequence[str]
    extra: Mapping[str, Any]

    @property
    def fields(self) -> set[str]:
        """The arguments of which the user has said something."""
        size = () if self.size is None else ("width", "height")
        return {*self.extra, *size, "prompt", "num_inference_steps"}


def two_requests(
    pipeline: Any, wishes: Wishes, check: Callable[[DiffusionRequest], object], tell: Callable[[str], None]
) -> list[DiffusionRequest]:
    """Two requests that differ in prompt, seed, guidance, pictures and steps, the first of which ``pipeline`` can do.

    Args:
        pipeline: What is asked.
        wishes: The user's.
        check: Raises :class:`~steploom.errors.InvalidRequest` for what the engine would refuse.
        tell: Is told what is being tried.

    Raises:
        GenerationFailed: It takes none of those that were tried.
        InvalidRequest: The engine would refuse something that the user wishes.
    """
    faults: dict[str, None] = {}
    tried = 0
    for requests in _candidates(pipeline, wishes):
        tried += 1
        tell(f"what it takes, alone: {described(requests[0])}")
        try:
            for request in requests:
                check(request)
            trial.run_alone(pipeline, requests[0])
        except InvalidRequest as refusal:
            if refusal.field in wishes.fields:
                raise
            faults[f"{_line(refusal)}"] = None
            continue
        except Exception as fault:  # noqa: BLE001 - whatever a pipeline raises at what it does not take
            faults[f"{type(fault).__name__}: {_line(fault)}"] = None
            continue
        return requests
    told = "; ".join(list(faults)[:_TOLD])
    raise GenerationFailed(
        f"{type(pipeline).__name__} alone, without steploom, takes none of {tried} ways of asking: {told}. "
        "Give what it needs with --set NAME=VALUE, or --size"
    )


def described(request: DiffusionRequest) -> str:
    """What ``request`` asks for, in a few words: numbers as they are, and the names of all else."""
    params = request.params
    size = f"{params['width']}x{params['height']}" if {"width", "height"} <= params.keys() else ""
    plain = (name for name in params if name not in ("width", "height"))
    said = (f"{n}={params[n]}" if isinstance(params[n], (int, float, str)) else n for n in plain)
    kind = "" if request.output_type == "pil" else f"output_type={request.output_type}"  # "pil" is the pipeline's own
    return ", ".join(filter(None, [size, *said, kind]))


def _line(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:200]


def _candidates(pipeline: Any, wishes: Wishes) -> Iterator[list[DiffusionRequest]]:
    """Ways of asking, the usual one first."""
    accepted = signatures.call_parameters(pipeline)
    kinds = (
        [None] if "output_type" not in accepted or signatures.output_type(pipeline, "pil") != "pil" else [*_KINDS, None]
    )
    seen: list[tuple[str, ...]] = []
    for names in _PICTURES:
        present = tuple(name for name in names if name in accepted)
        if present in seen:
            continue
        seen.append(present)
        for size, short in _sizes(pipeline, accepted, wishes.size):
            for kind in kinds:
                yield [_Asking(pipeline, wishes, i, size, short=short).request(present, kind) for i in range(2)]


def _sizes(pipeline: Any, accepted: Mapping[str, Any], wanted: int | None) -> Iterator[tuple[int | None, bool]]:
    """Sizes (None: the pipeline's own), and whether to ask for few frames and seconds."""
    if wanted is not None:
        yield from ((wanted, True), (wanted, False))
        return
    info = loading.describe(pipeline, in_process=True)
    most = (SMALL_VIDEO if "num_frames" in accepted else SMALL) * (info.pixels_per_latent or _PIXELS_PER_LATENT)
    first = min(most, *(info.default_size or (most,)))
    multiple = info.size_multiple
    fitting = [max(size - size % multiple, multiple) for size in (first, *_SMALLER) if size <= first]
    yield from ((size, True) for size in dict.fromkeys(fitting))
    yield from ((None, True), (None, False))


class _Asking:
    """One request of the two, in one way of asking.

    Args:
        pipeline: What is asked.
        wishes: The user's.
        i: Which of the two.
        size: Pixels along a side; None for the pipeline's own.
        short: Whether to ask for few frames and seconds.
    """

    def __init__(self, pipeline: Any, wishes: Wishes, i: int, size: int | None, *, short: bool) -> None:
        self._pipeline, self._wishes, self._i, self._size = pipeline, wishes, i, size
        self._accepted = signatures.call_parameters(pipeline)
        self._short = _SHORT if short else {}

    def request(self, pictures: Sequence[str], kind: str | None) -> DiffusionRequest:
        """The request, with these pictures and those that must be given."""
        values: dict[str, Any] = {**self._lengths(), **self._short, **{name: self._given(name) for name in pictures}}
        for name, parameter in self._accepted.items():
            needed = parameter.default is inspect.Parameter.empty or name in _DRAWN
            if needed and name not in values:
                values[name] = self._given(name)
        values = {name: value for name, value in values.items() if name in self._accepted and value is not None}
        values |= dict(self._wishes.extra)
        prompt = values.pop("prompt", self._wishes.prompts[self._i]) if "prompt" in self._accepted else None
        settings: dict[str, Any] = {"request_id": f"r{self._i}", "seed": self._i, "output_type": kind or "pil"}
        return DiffusionRequest(prompt, **settings | values)

    def _lengths(self) -> dict[str, Any]:
        """Steps, sizes and guidance."""
        steps = self._wishes.steps
        found: dict[str, Any] = {"width": self._size, "height": self._size}
        if self._size is not None:  # some choose a size of a megapixel for a picture
            found |= {"max_area": self._size**2, "processing_resolution": self._size, "_auto_resize": False}
        found |= {name: steps for name in self._accepted if name.endswith("_num_inference_steps")}
        names = ("num_inference_steps", "decoder_num_inference_steps")
        found |= {name: steps + self._i for name in names if name in self._accepted}
        share, _ = lengths.shortened(self._pipeline)
        if share:  # whose default may leave none of few steps
            found[share] = _SHARE if int(steps * _SHARE) else 1.0
        guidance = getattr(self._accepted.get("guidance_scale"), "default", None)
        if isinstance(guidance, (int, float)):
            found["guidance_scale"] = guidance + 0.5 * self._i
        return found

    def _given(self, name: str) -> Any:
        """Something for an argument, by its name; None where nothing is known that would do."""
        side, frames = self._size or _SMALLER[0], _SHORT["num_frames"]
        if name == "mask_image":
            return _mask(side)
        if name in ("video", "conditioning_frames"):
            return [_picture(side, 100 * self._i + frame) for frame in range(frames)]
        if "image" in name and "embed" not in name:
            picture = _picture(side, self._i if name == "image" else 50 + self._i)
            return [[picture, picture], [picture, None]] if "task_prompt" in self._accepted else picture
        if name == "control_mode":
            return 0
        if "prompt" in name and "embed" not in name:
            return self._wishes.prompts[self._i]
        if name == "class_labels":
            return [self._i]
        return self._embedding(name) if "embed" in name else None

    def _embedding(self, name: str) -> Any:
        settings = getattr(loading.denoiser_of(self._pipeline), "config", {})
        noise = torch.Generator().manual_seed(self._i + sum(map(ord, name)))
        if isinstance(settings.get("effnet_in_channels"), int):  # a cascade's second stage: small latents of the first
            return torch.randn((1, settings["effnet_in_channels"], 3, 3), generator=noise)
        width = next((settings[key] for key in _WIDTHS if isinstance(settings.get(key), int)), None)
        return None if width is None else torch.randn((1, width), generator=noise)


def _picture(size: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def _mask(size: int) -> Image.Image:
    """White, to be painted anew, in its lower half."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[size // 2 :] = 255
    return Image.fromarray(pixels)
