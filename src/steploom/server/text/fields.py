"""The fields of a request for text: what each may be, and what cannot be done here.

OpenAI's own fields have OpenAI's names and meanings; the others are called as the pipelines call them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from steploom.errors import InvalidRequest
from steploom.server.errors import invalid
from steploom.server.fields import OWN as OWN_OF_IMAGES
from steploom.server.fields import unknown
from steploom.server.kinds import Kind, between, choice, flag, seconds, text, whole
from steploom.server.settings import ServerSettings
from steploom.server.text.messages import Message, length_of, messages_of, prompts_of

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
LENGTHS = ("max_completion_tokens", "max_tokens", "gen_length")
"""What clients call the number of tokens of a text, at most; the first that is given is what errors name."""


@dataclasses.dataclass(kw_only=True)
class TextFields:
    """A request for text, read and typed. None is "not given".

    Attributes:
        prompts: What to go on from, each on its own; of a chat there are none.
        messages: A chat so far.
        n: How many texts for each prompt, each with a seed of its own.
        stream: Whether to answer with server-sent events.
        include_usage: Whether a stream ends with its tokens counted.
        stop: Where a text ends: before the first of these.
        max_tokens: Tokens of each text, at most.
        model: What the client calls the model.
        user: Whom to charge: ``safety_identifier``, or else ``user``.
        safety_identifier: As given.
        own: Fields of ours, for :class:`~steploom.DiffusionRequest`.
        params: Arguments of the pipeline.
        length_name: What the client called ``max_tokens``.
    """

    prompts: list[str] = dataclasses.field(default_factory=list[str])
    messages: list[Message] | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    own: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    params: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    length_name: str = "max_tokens"


def _stops(name: str, value: Any) -> tuple[str, ...]:
    entries: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(entries) > MAX_STOPS:
        raise invalid(f"{name}: {len(entries)} sequences, at most {MAX_STOPS}", name)
    for entry in entries:
        if not 0 < len(text(name, entry)) <= MAX_STOP_CHARS:
            raise invalid(f"{name}={entry!r:.80}: must have 1 to {MAX_STOP_CHARS} characters", name)
    return tuple(entries)


_STOP = {**text.schema, "minLength": 1, "maxLength": MAX_STOP_CHARS}
stops = Kind(_stops, {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]})
"""A string, or up to four of them; none may be empty."""


def include_usage(name: str, value: Any) -> bool:
    """``include_usage`` of the options of a stream; ``include_obfuscation`` has no effect."""
    if not isinstance(value, dict):
        raise invalid(f"{name}={value!r:.80}: must be an object", name, "invalid_type")
    options = cast("dict[str, Any]", value)
    for key, entry in options.items():
        if key not in ("include_usage", "include_obfuscation"):
            raise unknown(f"{name}.{key}", (f"{name}.include_usage", f"{name}.include_obfuscation"))
        if entry is not None:
            flag(f"{name}.{key}", entry)
    return bool(options.get("include_usage"))


OPENAI: dict[str, Kind] = {
    "model": text, "n": whole(1), "stream": flag, "stop": stops, "user": text, "safety_identifier": text,
}  # fmt: skip
"""Fields of OpenAI's, by name; besides prompts, lengths, options of streams, and those of :data:`PARAMS`."""

OWN: dict[str, Kind] = {
    **{name: OWN_OF_IMAGES[name] for name in ("seed", "priority", "lora")}, "timeout": seconds, "deadline": seconds,
}  # fmt: skip
"""Fields of :class:`~steploom.DiffusionRequest`."""

_COUNT = whole(1, 1000)
PARAMS: dict[str, Kind] = {
    "temperature": between(0, 2), "top_p": between(0, 1, above=True), "top_k": whole(-1, 2**31 - 1),
    "num_inference_steps": whole(1), "block_length": whole(1), "threshold": between(0, 2),
    "editing_threshold": between(-1, 2), "max_post_steps": whole(0, 1000), "minimal_topk": whole(1),
    "sampling_method": choice("auto", "greedy", "multinomial"), "eos_early_stop": flag, "stability_threshold": _COUNT,
    "confidence_threshold": between(0, 1000), "use_chat_template": flag, "add_generation_prompt": flag,
}  # fmt: skip
"""Arguments of the pipelines, OpenAI's own among them."""

NEUTRAL: dict[str, tuple[Any, ...]] = {"temperature": (1.0,), "top_p": (1.0,), "top_k": (0, -1)}
"""What changes nothing, so that a pipeline without the argument need not be told."""

IGNORED = ("metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
           "reasoning_effort", "verbosity", "parallel_tool_calls")  # fmt: skip
"""OpenAI's fields that mean nothing here: any value is taken."""

INERT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "moderation": (), "web_search_options": (),
}  # fmt: skip
"""OpenAI's fields that ask for what cannot be done here, and the values that ask for nothing."""


def read_fields(given: Mapping[str, Any], settings: ServerSettings, max_tokens: int, *, chat: bool) -> TextFields:
    """The typed fields of a decoded body. Null is "not given".

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    fields = TextFields()
    lengths = {name: given[name] for name in LENGTHS if given.get(name) is not None}
    _read_text(fields, given, settings, chat=chat)
    for name, value in given.items():
        if name not in _known(chat=chat):
            raise unknown(name, _known(chat=chat))
        if value is None or name in ("prompt", "messages", *lengths):
            continue
        if name in OPENAI:
            setattr(fields, name, OPENAI[name](name, value))
        elif name in OWN:
            fields.own[name] = OWN[name](name, value)
        elif name in PARAMS:
            fields.params[name] = PARAMS[name](name, value)
        elif name == "stream_options":
            fields.include_usage = include_usage(name, value)
        elif name not in IGNORED:
            _refuse(name, value, chat=chat)
    _check(fields, given, settings)
    _read_lengths(fields, lengths, max_tokens)
    fields.user = fields.safety_identifier or fields.user
    return fields


def _known(*, chat: bool) -> set[str]:
    lengths = LENGTHS if chat else LENGTHS[1:]
    source = "messages" if chat else "prompt"
    return {*OPENAI, *OWN, *PARAMS, *IGNORED, *INERT, *lengths, source, "logprobs", "stream_options"}


def _refuse(name: str, value: Any, *, chat: bool) -> None:
    """Refuses a field that nothing here reads, unless it asks for nothing; of prompts ``logprobs=0`` asks for some."""
    inert = (False,) if name == "logprobs" and chat else INERT.get(name, ())
    if value not in inert:
        mend = f"leave it out, or give {' or '.join(map(repr, inert))}" if inert else "leave it out"
        raise invalid(f"{name}={value!r:.80}: cannot be done here; {mend}", name, "unsupported_parameter")


def _read_text(fields: TextFields, given: Mapping[str, Any], settings: ServerSettings, *, chat: bool) -> None:
    name = "messages" if chat else "prompt"
    if given.get(name) is None:
        raise invalid(f"{name}: must be given", name, "missing_required_parameter")
    if chat:
        fields.messages = messages_of(given[name])
        chars = length_of(fields.messages)
    else:
        fields.prompts = prompts_of(given[name])
        chars = max(map(len, fields.prompts))
    if chars > settings.max_prompt_chars:
        raise invalid(f"{name}: {chars} characters, at most {settings.max_prompt_chars}", name)


def _check(fields: TextFields, given: Mapping[str, Any], settings: ServerSettings) -> None:
    choices = fields.n * max(1, len(fields.prompts))
    if choices > settings.max_choices:
        name = "n" if fields.n > 1 else "prompt"
        raise invalid(f"{name}: {choices} texts are asked for; must be at most {settings.max_choices}", name)
    if given.get("stream_options") is not None and not fields.stream:
        raise invalid("stream_options: belongs to stream=true; leave it out", "stream_options")


def _read_lengths(fields: TextFields, lengths: Mapping[str, Any], max_tokens: int) -> None:
    """How long the text may be; blocks may not be longer than the longest text, since they are memory too."""
    read = whole(1, max_tokens)
    for name, value in reversed(list(lengths.items())):
        found = read(name, value)
        if fields.max_tokens not in (None, found):
            raise invalid(f"{name}={found}, {fields.length_name}={fields.max_tokens}: give one of both", name)
        fields.max_tokens, fields.length_name = found, name
    for name in ("block_length", "minimal_topk"):
        if name in fields.params:
            read(name, fields.params[name])


def param_of(error: InvalidRequest, fields: TextFields) -> str | None:
    """What the client called the field that the engine refused."""
    return fields.length_name if error.field == "gen_length" else error.field
