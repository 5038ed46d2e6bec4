"""What the video API takes and answers, from the tables of ``videos/fields.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steploom.server.kinds import LARGEST
from steploom.server.openapi.components import INTEGER, NUMBER, TEXT, component, constant, exactly, or_null
from steploom.server.openapi.images import FILE, PICTURE
from steploom.server.openapi.operation import Content, as_json
from steploom.server.videos.fields import IMPOSSIBLE, known_fields

if TYPE_CHECKING:
    from steploom.server.state import ServerState

_PICTURE_FIELD = "input_reference"


def _fields(state: ServerState) -> dict[str, Any]:
    schemas = {name: dict(kind.schema) for name, kind in known_fields(state.settings).items()}
    config = state.engine.config
    for name, bound in (("num_inference_steps", config.max_steps), ("num_frames", config.max_frames),
                        ("width", config.max_pixels), ("height", config.max_pixels)):  # fmt: skip
        schemas[name]["maximum"] = min(bound, LARGEST)
    return schemas


def video_body(state: ServerState) -> Content:
    """Of ``/v1/videos``, and of a remix."""
    fields = _fields(state)
    picture = or_null({"anyOf": [PICTURE, {"type": "array", "items": PICTURE, "maxItems": 1}]})
    given = {name: schema if name == "prompt" else or_null(schema) for name, schema in fields.items()}
    given |= {name: {"type": "null", "description": why} for name, why in IMPOSSIBLE.items()}
    sent = {**fields, "lora": {**TEXT, "description": "A name, or JSON."}, _PICTURE_FIELD: FILE}
    shape = {"type": "object", "required": ["prompt"], "additionalProperties": False}
    return {
        **as_json({**shape, "properties": {**given, _PICTURE_FIELD: picture}}),
        "multipart/form-data": {**shape, "properties": sent},
    }


_FAULT = exactly({"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": TEXT})
VIDEO = component(
    "Video",
    exactly({
        "id": TEXT, "object": constant("video"), "created_at": INTEGER, "completed_at": or_null(INTEGER),
        "expires_at": or_null(INTEGER), "model": TEXT, "prompt": TEXT,
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100}, "seconds": TEXT, "size": TEXT,
        "error": or_null(_FAULT), "remixed_from_video_id": or_null(TEXT), "seed": or_null({"type": "integer"}),
        "num_frames": or_null(INTEGER), "fps": NUMBER, "step": INTEGER, "num_inference_steps": or_null(INTEGER),
    }),
)  # fmt: skip
VIDEOS = component(
    "Videos",
    exactly({
        "object": constant("list"), "data": {"type": "array", "items": VIDEO}, "has_more": {"type": "boolean"},
        "first_id": or_null(TEXT), "last_id": or_null(TEXT),
    }),
)  # fmt: skip
DELETED = component(
    "VideoDeleted", exactly({"id": TEXT, "object": constant("video.deleted"), "deleted": constant(True)})
)
FILES: Content = dict.fromkeys(("video/mp4", "image/webp", "image/jpeg"), FILE)
PART: Content = {**FILES, "multipart/byteranges": FILE}
