"""Which pipeline classes of diffusers do which task of one family, by the names that diffusers gives its classes.

``StableDiffusionXLPipeline``, ``StableDiffusionXLImg2ImgPipeline``, ``StableDiffusionXLControlNetInpaintPipeline``: the
*stem* is the family, what follows it is the task and what the pipeline has besides. diffusers' auto classes hold the
same as a table, but importing that table imports every pipeline there is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from inspect import Parameter
from typing import Any

from steploom.weave import signatures, untyped
from steploom.worker.traits.needs import does_without

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

_KANDINSKY_INPAINTING = ("unet", (9,))
"""It puts the mask and the masked image beside the latents, always."""

_CHANNELS = {
    "KandinskyInpaintCombinedPipeline": _KANDINSKY_INPAINTING,
    "KandinskyInpaintPipeline": _KANDINSKY_INPAINTING,
    "KandinskyV22InpaintCombinedPipeline": _KANDINSKY_INPAINTING,
    "KandinskyV22InpaintPipeline": _KANDINSKY_INPAINTING,
    "StableDiffusion3InpaintPipeline": ("transformer", (16, 33)),
}
"""Channels of the denoiser that a class insists on."""

_FROM_IMAGE = (
    "CycleDiffusion", "Depth2Img", "Edit", "I2VGen", "Layered", "Pix2Pix", "Refiner", "SuperResolution", "Upscale",
    "VideoToWorld",
)  # fmt: skip
"""In the names of classes that need an image, or a video, although it has a default."""

_FILLS = ("Fill", "PaintByExample", "RePaint")
"""In the names of classes for inpainting that are not called after it."""

_GUIDED = ("Adapter", "Control")
"""In the names of classes whose image says where things are: what they make, they make from text."""

_STAGES = ("Prior",)
"""In the names of classes that make embeddings; those that need some are stages of a cascade as well."""

_INSTEAD = frozenset({"image_embeds", "image_embeddings"})
"""Arguments that may be given in place of an image."""

_FRAMES = frozenset({"num_frames", "video_length", "frames", "video", "control_video", "pose_video"})
"""Arguments of pipelines that make videos."""

_EXTRA = {
    "QwenImageControlNetInpaintPipeline": "extra_condition_channels",
    "StableDiffusion3ControlNetInpaintingPipeline": "extra_conditioning_channels",
}
"""Classes whose ControlNet takes a mask beside its image, and the setting of the ControlNet that says so."""

_SETTINGS = {"ChromaInpaintPipeline": "guidance_embeds"}
"""A setting of the transformer that a class asks for; that of the family has none."""

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
    name, parameters = cls.__name__, signatures.call_parameters(cls)
    kind = Kind.of(name)
    if not {"height", "resolution", "image"} & parameters.keys() or "gen_length" in parameters:  # text
        return ()
    embeddings = parameters.get("image_embeds")
    if any(word in name for word in _STAGES) or (embeddings is not None and embeddings.default is embeddings.empty):
        return ()
    if kind.task:
        return (kind.task,)
    if any(word in name for word in _FILLS):
        return ("inpainting",)
    to = "video" if _FRAMES & parameters.keys() else "image"
    sources = [] if is_guided(name) else [parameters[source] for source in ("image", "video") if source in parameters]
    tasks = [f"{source.name}-to-{to}" for source in sources]
    needs = any(source.default is source.empty for source in sources)
    if sources or "images" in parameters:
        needs = needs or (any(word in name for word in _FROM_IMAGE) and not _does_without(cls, sources))
    if "prompt" in parameters and not needs:
        tasks.insert(0, f"text-to-{to}")
    return tuple([task for task in tasks if task in _WORDS])


def _does_without(cls: type, sources: Sequence[Parameter]) -> bool:
    """Whether a class whose name says that it needs a picture has an answer to there being none."""
    return bool(sources) and all(does_without(cls, source.name) for source in sources)


def is_guided(name: str) -> bool:
    """Whether a class of that name takes an image that says where things are."""
    return any(word in name for word in _GUIDED)


def needed(cls: type, task: str) -> frozenset[str]:
    """Arguments that ``cls`` needs for ``task`` although they have a default in diffusers."""
    known = signatures.call_parameters(cls).keys()
    wanted: list[tuple[str, ...]] = []
    if is_guided(cls.__name__):
        wanted.append(("control_image", "image", "conditioning_frames", "control_video"))
    if task in ("image-to-image", "image-to-video") and not known & _INSTEAD:
        wanted.append(("image",))
    elif task == "inpainting":
        wanted.append(("image", "control_image"))
        if not any(word in cls.__name__ for word in _FILLS):  # which take what the mask makes of the image as well
            wanted.append(("mask_image", "mask", "control_mask"))
    elif task == "video-to-video":
        wanted.append(("video",))
    return frozenset(next(name for name in names if name in known) for names in wanted if known & set(names))


def fits(cls: type, pipeline: Any, controlnet: Any = None) -> bool:
    """Whether the networks have the channels and settings that ``cls`` asks for; most classes tell only when they run.

    A UNet that takes the mask or another image among its channels can be asked for nothing else.
    """
    if cls is type(pipeline):
        return True
    if not _takes_settings(cls, pipeline) or not _takes_controlnet(cls, controlnet):
        return False
    channels, made = _channels(pipeline, "unet")
    if isinstance(channels, int) and isinstance(made, int) and made not in (channels, 2 * channels):
        return False
    component, wanted = _CHANNELS.get(cls.__name__, ("", ()))
    return not wanted or _channels(pipeline, component)[0] in wanted


def _takes_settings(cls: type, pipeline: Any) -> bool:
    """Whether ``cls`` goes with what the pipeline and its transformer are set to."""
    aesthetic = "requires_aesthetics_score"  # of SDXL's refiner, which is told a score with the sizes
    if getattr(pipeline.config, aesthetic, False) and not signatures.takes(cls.__init__, aesthetic):
        return False
    name = _SETTINGS.get(cls.__name__)
    return name is None or hasattr(getattr(getattr(pipeline, "transformer", None), "config", None), name)


def _takes_controlnet(cls: type, controlnet: Any) -> bool:
    """Whether the ControlNet (the first of several) has the channels that ``cls`` gives it."""
    if controlnet is None or not Kind.of(cls.__name__).control:
        return True
    config: Any = getattr(next(iter(getattr(controlnet, "nets", [controlnet]))), "config", None)
    extra = any(getattr(config, name, 0) for name in _EXTRA.values())
    return extra == (cls.__name__ in _EXTRA)


def _channels(pipeline: Any, component: str) -> tuple[Any, Any]:
    config: Any = getattr(getattr(pipeline, component, None), "config", None)
    return getattr(config, "in_channels", None), getattr(config, "out_channels", None)
