"""What the text API takes and answers, from the tables of ``text/fields.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steploom.server.openapi.components import (
    ERROR,
    INTEGER,
    TEXT,
    Schema,
    component,
    constant,
    exactly,
    or_null,
)
from steploom.server.openapi.operation import Content, as_json
from steploom.server.text.fields import IGNORED, INERT, LENGTHS, OPENAI, OWN, PARAMS
from steploom.server.text.messages import ROLES

if TYPE_CHECKING:
    from steploom.server.state import ServerState

_FILLED = {"type": "string", "minLength": 1}
_PROMPT = {"anyOf": [_FILLED, {"type": "array", "items": _FILLED, "minItems": 1}]}
_MESSAGE = component(
    "Message",
    {
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": {"type": ["string", "array", "null"]}},
        "required": ["role"],
    },
)
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}
_OPTIONS = {
    "type": "object",
    "properties": {name: {"type": ["boolean", "null"]} for name in ("include_usage", "include_obfuscation")},
    "additionalProperties": False,
}


def text_body(state: ServerState, *, chat: bool) -> Content:
    """Of ``/v1/completions``, or of ``/v1/chat/completions``, with the bounds of this server."""
    source, what = ("messages", _MESSAGES) if chat else ("prompt", _PROMPT)
    bounds = {"n": {"maximum": state.settings.max_choices}}
    bounds["num_inference_steps"] = {"maximum": state.engine.config.max_steps}
    length = {"type": "integer", "minimum": 1, "maximum": state.engine.config.max_tokens}
    properties: dict[str, Any] = {name: {"description": "Accepted, without effect."} for name in IGNORED}
    properties |= {name: {"enum": [None, *values]} for name, values in INERT.items()}
    properties |= {name: or_null(length) for name in (LENGTHS if chat else LENGTHS[1:])}
    for name, kind in (OPENAI | OWN | PARAMS).items():
        properties[name] = or_null({**kind.schema, **bounds.get(name, {})})
    properties |= {source: what, "logprobs": {"enum": [None, False] if chat else [None]}}
    properties["stream_options"] = or_null(_OPTIONS)
    return as_json({"type": "object", "properties": properties, "required": [source], "additionalProperties": False})


_USAGE = component("TextUsage", exactly(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), INTEGER)))
_REASON = {"type": "string"}
_SEED = or_null({"type": "integer"})
_NULL = {"type": "null"}


def _answer(name: str, kind: str, *, usage: Schema, optional: tuple[str, ...] = (), **said: Schema) -> Schema:
    ended = {"finish_reason": or_null(_REASON), "logprobs": _NULL, "seed": _SEED}
    choice = exactly({"index": INTEGER, **said, **ended}, *(("seed",) if optional else ()))
    return component(
        name,
        exactly(
            {
                "id": TEXT, "object": constant(kind), "created": INTEGER, "model": TEXT, "system_fingerprint": _NULL,
                "choices": {"type": "array", "items": choice}, "usage": usage,
            },
            *optional,
        ),
    )  # fmt: skip


_REPLY = exactly({"role": constant("assistant"), "content": TEXT, "refusal": _NULL})
_DELTA = exactly({"role": constant("assistant"), "content": TEXT}, "role", "content")
_COUNTED = or_null(_USAGE)
_WHOLE = {
    True: _answer("ChatCompletion", "chat.completion", message=_REPLY, usage=_USAGE),
    False: _answer("Completion", "text_completion", text=TEXT, usage=_USAGE),
}
_CHUNK = {
    True: _answer("ChatCompletionChunk", "chat.completion.chunk", delta=_DELTA, usage=_COUNTED, optional=("usage",)),
    False: _answer("CompletionChunk", "text_completion", text=TEXT, usage=_COUNTED, optional=("usage",)),
}


def text_answer(*, chat: bool) -> Content:
    """Whole, or as server-sent events: chunks, and ``[DONE]`` at the end."""
    said = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [_CHUNK[chat], ERROR]}}
    events = exactly({"event": TEXT, "data": {"anyOf": [constant("[DONE]"), said]}}, "event")
    return {**as_json(_WHOLE[chat]), "text/event-stream": events}
