"""Which pipeline classes of diffusers do which task of one family, by the names that diffusers gives its classes.

``StableDiffusionXLPipeline``, ``StableDiffusionXLImg2ImgPipeline``, ``StableDiffusionXLControlNetInpaintPipeline``: the
*stem* is the family, what follows it is the task and what the pipeline has besides. diffusers' auto classes hold the
same as a table, but importing that table imports every pipeline there is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from steploom.weave import signatures, untyped

CONTROLNET = "controlnet"
"""The task of all pipelines that take an image for a ControlNet, whatever else they do."""

_WORDS = {
    "text-to-image": ("",),
    "image-to-image": ("Img2Img",),
    "inpainting": ("Inpaint", "Inpainting"),
    "text-to-video": ("",),
    "image-to-video": ("ImageToVideo",),
    "video-to-video": ("VideoToVideo",),
}
"""How class names say a task."""

_IMAGE_TO_VIDEO = ("LTX", "LTX2")
"""Families whose pipelines from text and from an image take one and the same denoiser; others' differ in channels."""

_CHANNELS = {"StableDiffusion3InpaintPipeline": (16, 33)}
"""Channels of the transformer that a class insists on."""

_EDITS = ("Edit", "Layered")
"""In the names of classes that need an image, although it has a default."""

_NAME = re.compile(
    r"^(?P<stem>.+?)(?P<control>ControlNet(?:Union)?(?!XS))?(?P<pag>PAG)?"
    r"(?P<task>Img2Img|Inpainting|Inpaint|ImageToVideo|VideoToVideo)?(?P<late>ControlNet)?(?P<combined>Combined)?"
    r"Pipeline$"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a pipeline class's name says.

    Attributes:
        stem: The family.
        task: The task in it; "" where the name says none.
        control: ``"ControlNet"`` or ``"ControlNetUnion"`` if it has one, else "".
        pag: ``"PAG"`` if attention is perturbed, else "".
        combined: ``"Combined"`` for the pipelines that hold all stages of a cascade, else "".
    """

    stem: str
    task: str = ""
    control: str = ""
    pag: str = ""
    combined: str = ""

    @classmethod
    def of(cls, name: str) -> Kind:
        """Takes a class name apart."""
        match = _NAME.match(name)
        if match is None:
            return cls(name)
        part = {key: value or "" for key, value in match.groupdict().items()}
        task = next((task for task, words in _WORDS.items() if part["task"] and part["task"] in words), "")
        return cls(part["stem"], task, part["control"] or part["late"], part["pag"], part["combined"])

    def sibling(self, task: str, control: str) -> type | None:
        """The class of the same family that does ``task``, if there is one."""
        for word in _WORDS[task]:
            for name in (f"{control}{self.pag}{word}", f"{self.pag}{word}{control}"):
                found = untyped.pipeline_class(f"{self.stem}{name}{self.combined}Pipeline")
                if found is not None:
                    return found
        return None


def siblings(cls: type, control: str) -> Iterator[tuple[str, type]]:
    """Tasks and the classes of the family of ``cls`` that do them, the plainest first.

    Args:
        cls: The class of a pipeline.
        control: ``"ControlNet"`` or ``"ControlNetUnion"`` if there is one to be had, else "".
    """
    kind = Kind.of(cls.__name__)
    own = own_tasks(cls)
    if not kind.control:
        yield from ((task, cls) for task in own)
    if "image-to-video" in own and kind.stem not in _IMAGE_TO_VIDEO:
        return
    for controls in ("", control) if control else ("",):
        for word in _tasks_like(own, kind.stem):
            found = kind.sibling(word, controls)
            if found is not None and (found is not cls or kind.control):
                yield from ((task, found) for task in own_tasks(found))


def _tasks_like(own: tuple[str, ...], stem: str) -> list[str]:
    """Tasks that make the same as those of ``own``: images or videos."""
    if not own:
        return []
    video = own[0].endswith("video")
    alike = [task for task in _WORDS if task.endswith("video") == video]
    return [task for task in alike if task != "image-to-video" or stem in _IMAGE_TO_VIDEO]


def own_tasks(cls: type) -> tuple[str, ...]:
    """The tasks that a class does by itself; none where that cannot be told."""
    kind = Kind.of(cls.__name__)
    parameters = signatures.call_parameters(cls)
    if not {"height", "resolution", "image"} & parameters.keys() or "gen_length" in parameters:  # text
        return ()
    if kind.task:
        return (kind.task,)
    to = "video" if {"num_frames", "video_length"} & parameters.keys() else "image"
    source = parameters.get("video" if "video" in parameters else "image")
    if source is None or kind.control:
        return (f"text-to-{to}",)
    by_image = f"{source.name}-to-{to}"
    if by_image not in _WORDS:
        return ()
    needs = source.default is source.empty or any(word in cls.__name__ for word in _EDITS)
    return (by_image,) if needs else (f"text-to-{to}", by_image)


def needed(cls: type, task: str) -> frozenset[str]:
    """Arguments that ``cls`` needs for ``task`` although they have a default in diffusers."""
    kind = Kind.of(cls.__name__)
    known = signatures.call_parameters(cls).keys()
    wanted: list[tuple[str, ...]] = []
    if kind.control:
        wanted.append(("control_image", "image", "conditioning_frames"))
    if task in ("image-to-image", "image-to-video"):
        wanted.append(("image",))
    elif task == "inpainting":
        wanted += [("image", "control_image"), ("mask_image", "mask", "control_mask")]
    elif task == "video-to-video":
        wanted.append(("video",))
    return frozenset(next(name for name in names if name in known) for names in wanted if known & set(names))


def fits(cls: type, pipeline: Any) -> bool:
    """Whether the denoiser has the channels that ``cls`` asks for; most such classes tell only when they run.

    A UNet that takes the mask or another image among its channels can be asked for nothing else.
    """
    if cls is type(pipeline):
        return True
    channels, made = _channels(pipeline, "unet")
    if isinstance(channels, int) and isinstance(made, int) and made not in (channels, 2 * channels):
        return False
    wanted = _CHANNELS.get(cls.__name__)
    return wanted is None or _channels(pipeline, "transformer")[0] in wanted


def _channels(pipeline: Any, component: str) -> tuple[Any, Any]:
    config: Any = getattr(getattr(pipeline, component, None), "config", None)
    return getattr(config, "in_channels", None), getattr(config, "out_channels", None)
