"""What can be known to be wrong with a request before anything is queued.

Every refusal is an :class:`~steploom.errors.InvalidRequest` that names the field, its value and the mend. What only
the pipeline can know (a prompt that is too long, sizes that do not divide) is the pipeline's to raise.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from steploom.codec import check_request
from steploom.config import EngineConfig
from steploom.errors import ConfigError, InvalidRequest
from steploom.protocol import PipelineInfo
from steploom.requests import OWN_FIELDS, DiffusionRequest

COUNTS = ("num_inference_steps", "width", "height", "num_images_per_prompt", "num_videos_per_prompt", "num_frames",
          "gen_length", "block_length")  # fmt: skip
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
            nearest = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.5) or known
            raise ConfigError(f"{name}: EngineConfig has no such field; did you mean {' or '.join(nearest)}?")
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


def validate(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Checks ``request`` against the loaded pipeline and the engine's limits.

    Raises:
        InvalidRequest: Names the field, its value and the mend.
    """
    _check_names(request, info)
    _check_counts(request)
    _check_limits(request, info, config)
    _check_task(request, config)
    if not info.in_process:
        _check_travels(request)


def _check_names(request: DiffusionRequest, info: PipelineInfo) -> None:
    known = {parameter.name for parameter in info.parameters}
    for name in request.params:
        if name not in known:
            raise InvalidRequest(_unknown(name, known, info.pipeline_class), field=name)
    for parameter in info.parameters:
        given = request.prompt is not None if parameter.name == "prompt" else parameter.name in request.params
        if parameter.required and not given:
            raise InvalidRequest(f"{parameter.name}: {info.pipeline_class} requires it", field=parameter.name)
    if request.prompt is not None and "prompt" not in known:
        raise InvalidRequest(f"prompt: {info.pipeline_class} takes none", field="prompt")


def _unknown(name: str, known: set[str], pipeline_class: str) -> str:
    choice = sorted(known | set(OWN_FIELDS))
    nearest = difflib.get_close_matches(name, choice, n=NEAREST, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"it takes {', '.join(choice)}"
    return f"{name}: {pipeline_class} has no such argument; {hint}"


def _check_counts(request: DiffusionRequest) -> None:
    for name in COUNTS:
        value = request.params.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequest(f"{name}={value!r}: must be an integer of at least 1", field=name)


def _check_limits(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    steps = request.params.get("num_inference_steps") or info.default_steps or 1
    if steps > config.max_steps:
        raise InvalidRequest(
            f"num_inference_steps={steps}: at most {config.max_steps} (EngineConfig.max_steps)",
            field="num_inference_steps",
        )
    default = info.default_size or (1, 1)
    width = request.params.get("width") or default[0]
    height = request.params.get("height") or default[1]
    if width * height > config.max_pixels:
        raise InvalidRequest(
            f"width={width}, height={height}: at most {config.max_pixels} pixels (EngineConfig.max_pixels)",
            field="width",
        )


def _check_task(request: DiffusionRequest, config: EngineConfig) -> None:
    if request.task is not None and request.task != config.task:
        loaded = "the model's own task" if config.task is None else repr(config.task)
        raise InvalidRequest(
            f"task={request.task!r}: this engine was loaded for {loaded}, and switching per request is not there yet; "
            f"start an engine with EngineConfig(task={request.task!r})",
            field="task",
        )


def _check_travels(request: DiffusionRequest) -> None:
    """Refuses what cannot reach another process."""
    if "generator" in request.params:
        raise InvalidRequest(
            "generator: its state cannot travel to the worker process; give seed=..., or start the engine with "
            'distributed_executor_backend="inproc"',
            field="generator",
        )
    check_request(request)
