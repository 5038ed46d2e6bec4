"""What the images API takes and answers, from the tables of ``fields.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steploom.server.body import MAX_IMAGES
from steploom.server.fields import FORMATS, IGNORED, IMPOSSIBLE, MAX_PARTIAL_IMAGES, known_fields
from steploom.server.kinds import LARGEST, size
from steploom.server.openapi.components import (
    INTEGER,
    TEXT,
    Schema,
    component,
    constant,
    exactly,
    or_null,
)
from steploom.server.openapi.operation import Content, as_json

if TYPE_CHECKING:
    from steploom.server.state import ServerState

_EDITS_OWN = ("image", "images", "mask")
_LINK = {"anyOf": [TEXT, {"type": "object", "properties": {"url": TEXT}, "required": ["url"]}]}
PICTURE = component(
    "Picture",
    {
        "description": "A file in base64 or as a data: URL. No address is fetched.",
        "anyOf": [
            TEXT,
            {"type": "object", "properties": {"image_url": _LINK}, "required": ["image_url"]},
            {"type": "object", "properties": {"b64_json": _LINK}, "required": ["b64_json"]},
        ],
    },
)
_PICTURES = {"anyOf": [PICTURE, {"type": "array", "items": PICTURE, "minItems": 1, "maxItems": MAX_IMAGES}]}
FILE = {"type": "string", "format": "binary"}
_FILES = {"type": "array", "items": FILE, "minItems": 1, "maxItems": MAX_IMAGES}


def _fields(state: ServerState) -> dict[str, Any]:
    """The schema of each field that is read, with the bounds of this server and its engine."""
    schemas = {name: dict(kind.schema) for name, kind in known_fields(state.settings).items()}
    config = state.engine.config
    most = {"num_inference_steps": config.max_steps, "width": config.max_pixels, "height": config.max_pixels}
    for name, bound in most.items():
        schemas[name]["maximum"] = min(bound, LARGEST)
    return schemas


def _as_json(state: ServerState, pictures: dict[str, Any], impossible: dict[str, str]) -> Schema:
    properties: dict[str, Any] = {name: {"description": "Accepted, without effect."} for name in IGNORED}
    properties |= {name: schema if name == "prompt" else or_null(schema) for name, schema in _fields(state).items()}
    properties |= {name: or_null(schema) for name, schema in pictures.items()}
    properties |= {name: {"type": "null", "description": why} for name, why in impossible.items()}
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}


def _as_form(state: ServerState, pictures: dict[str, Any]) -> Schema:
    """A form has no null, and its values are texts, which are read as what the schema says."""
    properties = {**dict.fromkeys(IGNORED, TEXT), **_fields(state), **pictures}
    properties["lora"] = {**TEXT, "description": "A name, or JSON."}
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}


def generations_body(state: ServerState) -> Content:
    """Of ``/v1/images/generations``."""
    form = _as_form(state, {})
    return {
        **as_json(_as_json(state, {}, IMPOSSIBLE)),
        "multipart/form-data": form,
        "application/x-www-form-urlencoded": form,
    }


def edits_body(state: ServerState) -> Content:
    """Of ``/v1/images/edits``."""
    impossible = {name: why for name, why in IMPOSSIBLE.items() if name not in _EDITS_OWN}
    pictures = {"image": _PICTURES, "images": _PICTURES, "mask": PICTURE}
    given = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("image", "images")]
    files = {"image": FILE, "image[]": _FILES, "mask": FILE}
    sent = [{"required": ["image"]}, {"required": ["image[]"]}]
    return {
        **as_json({**_as_json(state, pictures, impossible), "anyOf": given}),
        "multipart/form-data": {**_as_form(state, files), "anyOf": sent},
    }


_TOKENS = exactly({"text_tokens": INTEGER, "image_tokens": INTEGER})
_USAGE = component(
    "Usage",
    exactly({
        "input_tokens": INTEGER, "input_tokens_details": _TOKENS, "output_tokens": INTEGER,
        "output_tokens_details": _TOKENS, "total_tokens": INTEGER,
    }),
)  # fmt: skip
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_IMAGE = component(
    "Image",
    exactly(
        {
            "b64_json": _BASE64, "url": {"type": "string", "format": "uri"}, "seed": or_null({"type": "integer"}),
            "flagged": {"type": "boolean", "description": "The safety checker held it back."},
        },
        "b64_json", "url", "flagged",
    ),
)  # fmt: skip
_SIZE = {"type": "string", "pattern": size.schema["pattern"]}
_FORMAT = {"enum": list(FORMATS)}
_ANSWER = component(
    "ImagesResponse",
    exactly(
        {
            "created": INTEGER, "background": constant("opaque"), "output_format": _FORMAT, "size": _SIZE,
            "data": {"type": "array", "items": _IMAGE, "minItems": 1}, "usage": _USAGE,
            "quality": {"enum": ["low", "medium", "high", "xhigh", "max"]}, "safety_identifier": TEXT,
        },
        "quality", "safety_identifier",
    ),
)  # fmt: skip


def _event(kind: str, **own: Schema) -> Schema:
    common = {
        "type": constant(kind), "b64_json": _BASE64, "background": {"enum": ["auto", "opaque"]}, "created_at": INTEGER,
        "output_format": _FORMAT, "size": _SIZE, "seed": or_null({"type": "integer"}),
        "quality": {"enum": ["low", "medium", "high", "xhigh", "max", "auto"]}, "image_index": INTEGER,
        "step": INTEGER, "num_inference_steps": or_null(INTEGER), "safety_identifier": TEXT,
    }  # fmt: skip
    name = "".join(part.capitalize() for part in kind.replace(".", "_").split("_"))
    return component(f"{name}Event", exactly({**common, **own}, "safety_identifier"))


def _sent(kind: str, data: Schema) -> Schema:
    said = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return exactly({"event": constant(kind), "data": said})


def images_answer(kind: str) -> Content:
    """Whole, or as server-sent events, each of which has the schema; ``kind`` begins their names."""
    index = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_PARTIAL_IMAGES}
    partial, completed = f"{kind}.partial_image", f"{kind}.completed"
    events = [
        _sent(partial, _event(partial, partial_image_index=index)),
        _sent(completed, _event(completed, usage=_USAGE)),
        _sent("error", _FAILED),
    ]
    return {**as_json(_ANSWER), "text/event-stream": {"oneOf": events}}


_FAILED = component(
    "ErrorEvent",
    exactly({"type": constant("error"), "error": {"$ref": "#/components/schemas/Error/properties/error"}}),
)
STORED: Content = {f"image/{kind}": FILE for kind in FORMATS}
