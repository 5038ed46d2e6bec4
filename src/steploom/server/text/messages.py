"""What a text is to follow: prompts, or the messages of a chat, of OpenAI's shapes as pipelines take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from steploom.server.errors import invalid

Message = dict[str, str]
"""``role`` and ``content``, as chat templates take it."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles, and what chat templates call them."""

_WITHOUT_EFFECT = ("name", "refusal", "annotations")
_PARTS = {"text": "text", "refusal": "refusal"}


def prompts_of(value: Any) -> list[str]:
    """A prompt, or a list of prompts.

    Raises:
        ApiError: 400: it is neither; tokens are not taken.
    """
    entries: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    for entry in entries:
        if isinstance(entry, (int, list)) and not isinstance(entry, bool):
            raise invalid("prompt: tokens are not taken here; send text", "prompt", "unsupported_value")
        if not isinstance(entry, str):
            raise invalid(f"prompt={entry!r:.80}: must be a string, or a list of strings", "prompt", "invalid_type")
        if not entry:
            raise invalid("prompt: must not be empty", "prompt")
    if not entries:
        raise invalid("prompt=[]: must have at least one prompt", "prompt")
    return entries


def messages_of(value: Any) -> list[Message]:
    """The messages of a chat; their parts of text are joined.

    Raises:
        ApiError: 400: a message is not of text, or of a role that there is none here.
    """
    if not isinstance(value, list) or not value:
        raise _wrong("must be a list of at least one message")
    return [_message(f"messages[{place}]", entry) for place, entry in enumerate(cast("list[Any]", value))]


def length_of(messages: Sequence[Message]) -> int:
    """Their characters."""
    return sum(len(message["content"]) for message in messages)


def _message(where: str, entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise _wrong(f"{where}={entry!r:.80}: must be an object with role and content")
    message = cast("dict[str, Any]", entry)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role={role!r:.80}: must be one of {', '.join(ROLES)}")
    for name, given in message.items():
        if name not in ("role", "content", *_WITHOUT_EFFECT) and given not in (None, []):
            raise _wrong(f"{where}.{name}: cannot be used here; leave it out")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    return {"role": ROLES[role], "content": _text(f"{where}.content", content)}


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong(f"{where}={content!r:.80}: must be a string, or a list of parts of text")
    return "".join(_part(f"{where}[{place}]", part) for place, part in enumerate(cast("list[Any]", content)))


def _part(where: str, part: Any) -> str:
    fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise _wrong(f"{where}.type={kind!r:.80}: must be text; the model reads nothing else here")
    found = fields.get(_PARTS[kind])
    if not isinstance(found, str):
        raise _wrong(f"{where}.{kind}={found!r:.80}: must be a string")
    return found


def _wrong(what: str) -> Exception:
    said = what if what.startswith("messages") else f"messages: {what}"
    return invalid(said, "messages")
