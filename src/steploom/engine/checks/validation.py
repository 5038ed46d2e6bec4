"""What can be known to be wrong with a request before anything is queued.

Every refusal is an :class:`~steploom.errors.InvalidRequest` that names the field, its value and the mend. What only
the pipeline can know (a prompt that is too long) is the pipeline's to raise.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from steploom import given, lora, step_caches
from steploom.codec import check_request
from steploom.config import EngineConfig
from steploom.engine.checks.areas import check_areas, check_made_of_pictures
from steploom.engine.checks.arguments import check_kinds
from steploom.engine.checks.counts import PER_PROMPT
from steploom.engine.checks.fits import check_fits
from steploom.engine.checks.limits import LENGTHS, STEPS, TEXTS, check_limits
from steploom.engine.checks.picture_checks import A_PICTURE, check_pictures
from steploom.errors import ConfigError, InvalidRequest
from steploom.media.pictures import brief
from steploom.noise_schedulers import check_noise_scheduler
from steploom.protocol import TASK_ALIASES, Parameter, PipelineInfo
from steploom.protocol.pictures import FRAMES, LATENT_WINDOWS, WINDOWS, takes_pictures
from steploom.requests import OWN_FIELDS, DiffusionRequest

COUNTS = ("width", "height", *PER_PROMPT, *FRAMES, *WINDOWS, *LATENT_WINDOWS, *LENGTHS, *TEXTS, "batch_size")
"""Arguments that count something, wherever a pipeline has them."""
NEAREST = 3


def make_config(config: EngineConfig | None, overrides: dict[str, Any]) -> EngineConfig:
    """``config`` (None: the defaults) with ``overrides``.

    Raises:
        ConfigError: A name is unknown, or a value is wrong.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in overrides:
        if name not in known:
            within = [one for one in known if name in one or one in name]
            nearest = within[:NEAREST] or difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.5)
            mend = f"did you mean {' or '.join(nearest)}?" if nearest else "help(steploom.EngineConfig) lists them"
            raise ConfigError(f"{name}: EngineConfig has no such field; {mend}")
    return dataclasses.replace(config or EngineConfig(), **overrides)


def make_request(prompt: Any, keywords: dict[str, Any]) -> DiffusionRequest:
    """The request that ``generate(prompt, **keywords)`` asks for; ``prompt`` may be a ready one.

    Raises:
        InvalidRequest: A field of ours is out of range, or keywords came with a ready request.
    """
    if not isinstance(prompt, DiffusionRequest):
        return DiffusionRequest(prompt, **keywords)
    if keywords:
        names = ", ".join(sorted(keywords))
        raise InvalidRequest(f"{names}: a ready DiffusionRequest takes no further keywords", field=min(keywords))
    return prompt


def validate(
    request: DiffusionRequest, info: PipelineInfo, config: EngineConfig, member: PipelineInfo | None = None
) -> None:
    """Checks ``request``, its pictures read already, against the loaded pipeline and the engine's limits.

    Args:
        request: As it will be queued.
        info: The loaded pipeline.
        config: Settings of the engine.
        member: What :func:`check_arguments` has said of this very request, if it was asked already.

    Raises:
        InvalidRequest: Names the field, its value and the mend.
    """
    member = member or check_arguments(request, info, config)
    check_pictures(request, member, config.max_pixels)
    check_made_of_pictures(request, member, config)
    _check_lora(request, info, config)
    if request.noise_scheduler is not None and info.noise_schedulers:
        lacking = info.noise_schedulers_lacking
        check_noise_scheduler(request.noise_scheduler, info.noise_schedulers, info.noise_scheduler, lacking)
    _check_generators(request)
    if not info.in_process:
        _check_travels(request, info, config)


def check_arguments(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> PipelineInfo:
    """Checks what can be checked before the request's pictures are read.

    Returns:
        The pipeline that will do it: that of the request's task.

    Raises:
        InvalidRequest: Names the field, its value and the mend.
    """
    loaded_for = request.task == config.task and request.task not in info.tasks
    member = info if loaded_for else info.serving(request)
    _check_names(request, member)
    _check_counts(request, member)
    check_kinds(request, member)
    check_fits(request, member)
    for name, value in {"prompt": request.prompt, **request.params}.items():
        given.check(name, value)
    check_areas(request, member, config)
    check_limits(request, member, config)
    _check_cache(request, member)
    return member


def _check_names(request: DiffusionRequest, info: PipelineInfo) -> None:
    if not info.parameters:
        return  # an executor of somebody's own that does not say
    known = {parameter.name for parameter in info.parameters}
    for name in request.params:
        if name not in known:
            raise InvalidRequest(_unknown(name, request, info), field=name)
    for parameter in info.parameters:
        name = parameter.name
        value = request.prompt if name == "prompt" else request.params.get(name)
        given = name in request.params if name != "prompt" and not takes_pictures(parameter) else value is not None
        if parameter.required and not given:
            raise InvalidRequest(f"{name}: {_called(request, info)} requires it{_mend(parameter)}", field=name)
    present = {"prompt": request.prompt, **request.params}
    for choice in info.needs:
        if all(present.get(name) is None for name in choice):
            first, *others = choice
            instead = f", or {' or '.join(others)}" if others else ""
            raise InvalidRequest(f"{first}: {_called(request, info)} requires it{instead}", field=first)
    if isinstance(request.prompt, list) and not request.prompt:
        raise InvalidRequest("prompt=[]: is empty; give at least one prompt", field="prompt")
    if request.prompt is not None and "prompt" not in known:
        raise InvalidRequest(f"prompt: {_called(request, info)} takes none", field="prompt")


def _called(request: DiffusionRequest, info: PipelineInfo) -> str:
    return info.pipeline_class if request.task is None else f"{info.pipeline_class} (task={request.task!r})"


def _mend(parameter: Parameter) -> str:
    return f"; give {parameter.name}=..., {A_PICTURE}" if takes_pictures(parameter) else ""


def _unknown(name: str, request: DiffusionRequest, info: PipelineInfo) -> str:
    known = {parameter.name for parameter in info.parameters}
    choice = sorted(known | set(OWN_FIELDS))
    nearest = difflib.get_close_matches(name, choice, n=NEAREST, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"it takes {', '.join(choice)}"
    tasks = _tasks_that_take(name, request, info)
    if tasks:
        hint = f"did you mean {' or '.join(f'task={task!r}' for task in tasks)}?"
    return f"{name}: {_called(request, info)} has no such argument; {hint}"


def _tasks_that_take(name: str, request: DiffusionRequest, info: PipelineInfo) -> list[str]:
    """Other tasks for which the request is right as it stands; else those that at least know the argument."""
    asked = TASK_ALIASES.get(request.task or "", request.task)
    others = {task: members for task, members in info.tasks.items() if task != asked}
    right = [task for task, members in others.items() if any(member.takes(request) for member in members)]
    return right or [
        task
        for task, members in others.items()
        if any(parameter.name == name for member in members for parameter in member.parameters)
    ]


def _check_counts(request: DiffusionRequest, info: PipelineInfo) -> None:
    others = {parameter.name for parameter in info.parameters if parameter.kind != "number"} & {"frames", "layers"}
    for name, value in request.params.items():
        if (name not in COUNTS and not name.endswith(STEPS)) or name in others:
            continue
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequest(f"{name}={brief(value)}: must be an integer of at least 1", field=name)


def _check_lora(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Refuses adapters that are nowhere, and any where there can be none."""
    if request.adapters and info.no_lora is not None:
        raise InvalidRequest(f"lora={brief(request.lora)}: {info.no_lora}", field="lora")
    if info.in_process:
        return  # the application may have loaded others into its pipeline meanwhile: the worker knows
    for name, _ in request.adapters:
        lora.find(name, config.loras or {}, info.loras)


def _check_cache(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses to skip steps where each one must be computed, or where there are none."""
    if step_caches.parse(request.cache) is None:
        return
    why = ""
    if info.makes == ["text"]:
        why = "writes text, of which no step is like the one before"
    elif info.parameters and info.noise_scheduler is None and info.default_steps is None:
        why = "has no denoising steps to skip"
    if why:
        raise InvalidRequest(
            f"cache={brief(request.cache)}: {_called(request, info)} {why}; leave it out, or give 'off'", field="cache"
        )


def _check_generators(request: DiffusionRequest) -> None:
    """Refuses what nothing can be drawn from."""
    if not request.generators and "generator" in request.params:
        raise InvalidRequest("generator=[]: is empty; give one per image, or seed=...", field="generator")
    for one in request.generators:
        if not hasattr(one, "clone_state"):
            raise InvalidRequest(
                f"generator={brief(one)}: must be a torch.Generator, or a list of one per image; or give seed=...",
                field="generator",
            )


def _check_travels(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Refuses what cannot reach another process, or is of no use there."""
    there = {"cpu", *(str(device).partition(":")[0] for device in (info.device, config.device))}
    for one in request.generators:
        if (kind := getattr(getattr(one, "device", None), "type", "cpu")) not in there:
            raise InvalidRequest(
                f"generator: is one of {kind!r}, and the model is on {info.device!r}; give a generator of the CPU, or "
                "seed=...",
                field="generator",
            )
    check_request(request)
