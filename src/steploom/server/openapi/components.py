"""The schemas of answers that several routes share, by name, and the shorthand that they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
COMPONENTS: dict[str, Schema] = {}
"""By name; whoever answers with a new kind of object adds its own (:func:`component`)."""

INTEGER: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}


def component(name: str, schema: Schema) -> Schema:
    """Registers a schema, and returns the reference to it."""
    COMPONENTS[name] = schema
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def constant(value: Any) -> Schema:
    """Always that."""
    return {"const": value}


def exactly(properties: Mapping[str, Schema], *optional: str) -> Schema:
    """An object with these properties and no others; all but ``optional`` are always there."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def listed(items: Schema) -> Schema:
    """OpenAI's list."""
    return exactly({"object": constant("list"), "data": {"type": "array", "items": items}})


ERROR = component(
    "Error",
    exactly({
        "error": exactly({
            "message": TEXT,
            "type": {
                "enum": [
                    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error",
                    "server_error",
                ]
            },
            "param": or_null(TEXT),
            "code": or_null(TEXT),
        })
    }),
)  # fmt: skip
"""OpenAI's error object."""
