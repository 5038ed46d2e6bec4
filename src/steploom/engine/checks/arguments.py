"""What kind of value each argument of a pipeline takes, by its annotation in diffusers, and what does not fit.

Only what would fail, or silently make an image of nothing (``guidance_scale=nan``), is refused; annotations that name
anything else than these kinds are not checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set, Sized
from typing import Any, cast

from steploom.errors import InvalidRequest
from steploom.given import is_number
from steploom.media.pictures import brief
from steploom.protocol import Parameter, PipelineInfo
from steploom.requests import DiffusionRequest

STEP_LISTS = ("timesteps", "sigmas")
"""How arguments end that list the steps."""

_PER_PROMPT = ("prompt_2", "prompt_3", "prompt_4")


def check_kinds(request: DiffusionRequest, info: PipelineInfo) -> None:
    """Refuses values of another kind than the pipeline's ``__call__`` is annotated with.

    Raises:
        InvalidRequest: Names the field, its value and what it must be.
    """
    for parameter in info.parameters:
        value: Any = request.prompt if parameter.name == "prompt" else request.params.get(parameter.name)
        fits, meaning = _kind(parameter)
        if value is None and parameter.name in request.params and not parameter.takes_none:
            raise InvalidRequest(
                f"{parameter.name}=None: must be {meaning or 'a number'}; leave it out for the pipeline's own default",
                field=parameter.name,
            )
        if parameter.name == "prompt" and isinstance(value, tuple):  # which most pipelines refuse
            raise InvalidRequest(f"prompt={brief(value)}: must be {meaning}, no tuple; give list(...)", field="prompt")
        if parameter.name == "prompt" and isinstance(value, list) and not value:
            raise InvalidRequest("prompt=[]: must be a str, or a list of str that is not empty", field="prompt")
        if value is not None and fits is not None and not fits(value):
            raise InvalidRequest(f"{parameter.name}={brief(value)}: must be {meaning}", field=parameter.name)
    _check_rows(request)


def _kind(parameter: Parameter) -> tuple[Callable[[Any], bool] | None, str]:
    """What fits a parameter, and how a message says it; None if nobody knows."""
    if parameter.name.endswith(STEP_LISTS):
        return _is_numbers, "a list of finite numbers, at least one"
    return _BY_NAME.get(parameter.name) or _KINDS.get(parameter.kind, (None, ""))


def _check_rows(request: DiffusionRequest) -> None:
    """Texts that go with the prompt are one, or one for each."""
    if not isinstance(request.prompt, (str, list)):
        return
    rows = 1 if isinstance(request.prompt, str) else len(request.prompt)
    for name, value in request.params.items():
        texts = (name in _PER_PROMPT or name.startswith("negative_prompt")) and "embeds" not in name
        if texts and isinstance(value, list) and len(cast("list[Any]", value)) != rows:
            count = len(cast("list[Any]", value))
            mend = f"give {rows}" if name in _PER_PROMPT and rows > 1 else f"give one str, or {rows}"
            raise InvalidRequest(f"{name}: {count} texts for {rows} prompts; {mend}", field=name)


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Sized) or getattr(value, "ndim", 1) == 0:
        return False  # a tensor without dimensions has no length, and says that it has one
    return len(value) > 0 and all(is_number(one) for one in cast("Any", value))


def _is_rate(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    texts = cast("list[Any]", value)
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in texts)


def _is_text_by_frame(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_text(value)
    texts = cast("dict[Any, Any]", value)
    return bool(texts) and all(type(frame) is int and isinstance(text, str) for frame, text in texts.items())


def _is_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_tensor(one) for one in cast("list[Any]", value))
    return hasattr(value, "is_cuda")  # this process may have no torch


def _is_callback(value: Any) -> bool:
    try:
        inspect.signature(value).bind(None, 0, 0, {})
    except TypeError:
        return False
    except ValueError:  # a builtin that does not tell
        return True
    return True


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_KINDS: dict[str, tuple[Callable[[Any], bool] | None, str]] = {
    "number": (is_number, "a finite number, and within 64 bits if an integer"),
    "text": (_is_text, "a str, or a list of str"),
    "text_by_frame": (_is_text_by_frame, "a str, a list of str, or with FreeNoise a dict of str by frame"),
    "tensor": (_is_tensor, "a torch.Tensor (torch.from_numpy makes one of an array)"),
    "mapping": (_is_mapping, "a dict"),
    "function": (callable, "a function"),
}
"""What :attr:`steploom.protocol.Parameter.kind` means, and how a message says it."""

_BY_NAME: dict[str, tuple[Callable[[Any], bool], str]] = {
    "callback_on_step_end": (_is_callback, "a function of (pipeline, step, timestep, callback_kwargs)"),
    "frame_rate": (_is_rate, "a finite number greater than 0"),
}
"""The same for arguments of which the annotation says less than is known."""
