"""What a worker tells about the pipeline that it has loaded."""

from __future__ import annotations

import difflib
from typing import Any, cast

import msgspec

from steploom import errors
from steploom.requests import DiffusionRequest

TASK_ALIASES = {
    "text2image": "text-to-image",
    "txt2img": "text-to-image",
    "image2image": "image-to-image",
    "img2img": "image-to-image",
    "inpaint": "inpainting",
}
"""What tasks are called elsewhere."""

SOUND = ("audio_length_in_s", "audio_end_in_s", "audio_duration", "audio_duration_s", "duration")
"""Arguments that say how many seconds of sound there will be."""

_CONTROLNET = "controlnet"


class Parameter(msgspec.Struct, frozen=True):
    """A parameter of a pipeline's ``__call__``.

    Attributes:
        name: Its name.
        required: Whether it must be given.
        kind: What values it takes: ``"number"``, ``"text"``, ``"text_by_frame"``, ``"tensor"``, ``"mapping"``,
            ``"function"``, ``"picture"`` (or several, as PIL images, arrays or tensors), ``"other"`` where it takes
            none although it is named like one that does; ``""`` if others do, or nobody knows.
        takes_none: Whether None may stand for a value.
    """

    name: str
    required: bool = False
    kind: str = ""
    takes_none: bool = True


class PipelineInfo(msgspec.Struct, kw_only=True):
    """What a worker tells about the pipeline that it loaded, per task where tasks differ.

    Attributes:
        pipeline_class: Name of the pipeline's class.
        parameters: Names accepted by its ``__call__``; empty where that is not known, and anything is passed on.
        needs: Arguments of which at least one must be given, list by list.
        default_steps: Default of ``num_inference_steps``, if it has that argument.
        default_length: Default of ``gen_length``, the tokens of a language model's text, if it has that argument.
        default_size: ``(width, height)`` used when none is given, if known.
        follows_pictures: Whether what is made of a picture may have the picture's size, where none is given.
        enlarges: How many times wider and higher its images are than ``width`` and ``height``, or the picture, say.
        pixels_per_latent: Pixels along a side for each latent; 0 where that is not known.
        latent_axes: Axes of the frames, the height and the width in the latents of a video.
        size_multiple: ``width`` and ``height`` must be multiples of this; 1 where the pipeline takes any size.
        size_multiple_unbinned: The same with ``use_resolution_binning=False``.
        size_multiple_pictured: Where a picture is given, they must be multiples of this, too.
        size_least: Neither may be smaller, since nothing would be left of it.
        size_most: Neither may be larger, since the model has positions for no more; None where it sets no bound.
        size_only: The one ``(width, height)`` for which the model has positions; None where it takes others.
        output_types: What ``output_type`` may be; empty where that is not known.
        decoder_left_out: What makes anything else than latents, if the pipeline was loaded without it; "" otherwise.
        shortened_by: The argument that says which share of the steps is taken (``"strength"``); "" if there is none.
        shortened_up: Whether a fraction of a step that is left of them is taken, too.
        modules: Names of the woven components.
        device: Where the denoiser lives.
        device_name: What that device is called, as costs depend on it.
        room_bytes: Memory that there is for requests and their forwards; 0 if nobody can say.
        dtype: Its dtype.
        in_process: Whether objects that cannot travel (functions: callbacks) may be passed.
        tasks: The tasks that a request may name, and the pipelines over the same components that do each: of several
            the first that takes the request's arguments does it.
        makes: What it makes, of ``"images"``, ``"videos"``, ``"audios"`` and ``"text"``; empty where that is not known.
        frame_rate: Frames per second that its videos are meant for, if it has a say in that.
        default_frames: Frames of its videos where ``num_frames`` is not given, if known.
        frame_multiple: ``num_frames`` should be a multiple of this and one more; others are rounded by the pipeline.
        frames_strict: Whether it does not round them, but fails.
        frames_least: Fewer it cannot make.
        frames_most: More it cannot make, since the model has positions for no more; None where it sets no bound.
        frames_only: The one number of frames, besides 1, for which the model has positions; None if it takes others.
        ids: Arguments that are ids, and how many the model has of each, from 0; nothing of what is not known.
        sampling_rate: Samples per second of its sound, if it makes any.
        default_sound_s: Seconds of its sound where no argument says so, if known.
        latent_sound_s: Seconds for each of its latents; 0 where that is not known.
        latent_sound_axis: Axis of its latents along which they follow each other.
        loras: Names of adapters that were loaded with the pipeline.
        no_lora: Why requests cannot have adapters; None if they can.
        noise_scheduler: Class of the pipeline's own noise scheduler, None if it has none.
        noise_schedulers: Classes that can stand in for it, and the settings that each takes.
        noise_schedulers_lacking: Those that could but for packages that are not installed, and these packages.
    """

    pipeline_class: str
    parameters: list[Parameter] = []
    needs: list[list[str]] = []
    default_steps: int | None = None
    default_length: int | None = None
    default_size: tuple[int, int] | None = None
    follows_pictures: bool = False
    enlarges: float = 1.0
    pixels_per_latent: int = 0
    latent_axes: tuple[int, int, int] = (2, 3, 4)
    size_multiple: int = 1
    size_multiple_unbinned: int = 1
    size_multiple_pictured: int = 1
    size_least: int = 1
    size_most: int | None = None
    size_only: tuple[int, int] | None = None
    output_types: list[str] = []
    decoder_left_out: str = ""
    shortened_by: str = ""
    shortened_up: bool = False
    modules: list[str] = []
    device: str = "cpu"
    device_name: str = ""
    room_bytes: int = 0
    dtype: str = "float32"
    in_process: bool = False
    makes: list[str] = []
    frame_rate: float | None = None
    default_frames: int | None = None
    frame_multiple: int = 1
    frames_strict: bool = False
    frames_least: int = 1
    frames_most: int | None = None
    frames_only: int | None = None
    ids: dict[str, int] = {}
    sampling_rate: int | None = None
    default_sound_s: float | None = None
    latent_sound_s: float = 0.0
    latent_sound_axis: int = 2
    loras: list[str] = []
    no_lora: str | None = None
    noise_scheduler: str | None = None
    noise_schedulers: dict[str, list[str]] = {}
    noise_schedulers_lacking: dict[str, str] = {}
    tasks: dict[str, list[PipelineInfo]] = {}

    def serving(self, request: DiffusionRequest) -> PipelineInfo:
        """The pipeline that does the request's task; this one if it names none.

        Raises:
            InvalidRequest: There is no such task here.
        """
        if request.task is None:
            return self
        members = self.tasks.get(TASK_ALIASES.get(request.task, request.task))
        if not members:
            raise errors.InvalidRequest(_no_such_task(request.task, self), field="task")
        right = (one for one in members if one.takes(request))
        knowing = (one for one in members if one.knows(request))  # which can tell what is missing
        member = next(right, None) or next(knowing, members[0])
        return msgspec.structs.replace(member, in_process=self.in_process, tasks=self.tasks)

    def takes(self, request: DiffusionRequest) -> bool:
        """Whether the request's arguments are all known here and none is missing."""
        needed = {parameter.name for parameter in self.parameters if parameter.required}
        return needed <= _given(request) and self.knows(request)

    def knows(self, request: DiffusionRequest) -> bool:
        """Whether the request's arguments are all known here."""
        return _given(request) <= {parameter.name for parameter in self.parameters}

    def in_own_words(self, request: DiffusionRequest) -> DiffusionRequest:
        """The request with a ControlNet's picture under the name that its pipeline has for it.

        Where that is drawn from text alone, Stable Diffusion's and SDXL's pipelines call it ``image``.
        """
        members = self.tasks.get(_CONTROLNET) if request.task == _CONTROLNET else None
        if not members or "control_image" not in request.params or "image" in request.params:
            return request
        known = {parameter.name for parameter in members[0].parameters}
        if "image" not in known or "control_image" in known:
            return request
        named = request.with_params(image=request.params["control_image"])
        cast("dict[str, Any]", named.params).pop("control_image")
        return named


def _given(request: DiffusionRequest) -> set[str]:
    return {*request.params, *(() if request.prompt is None else ("prompt",))}


def _no_such_task(task: str, info: PipelineInfo) -> str:
    there = ", ".join(map(repr, info.tasks)) or "no task by name"
    nearest = difflib.get_close_matches(task, info.tasks, n=1, cutoff=0.85)
    mend = f"start an engine with EngineConfig(task={task!r}) over a model that has it, or leave it out"
    if task == _CONTROLNET:
        mend = "give the engine a ControlNet that fits: EngineConfig(controlnet=...)"
    hint = f"did you mean {nearest[0]!r}?" if nearest else mend
    return f"task={task!r}: {info.pipeline_class} and its family serve {there}; {hint}"
