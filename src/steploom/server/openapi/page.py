"""What feeds the page: what the model takes, and its ticks."""

from __future__ import annotations

from steploom.server.openapi.components import INTEGER, TEXT, component, constant, exactly, listed, or_null
from steploom.server.openapi.operation import Content

_NAMES = {"type": "array", "items": TEXT}
_SIZE = {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 2}
INFO = component(
    "Info",
    exactly({
        "object": constant("info"), "version": TEXT, "models": _NAMES, "pipeline_class": TEXT, "makes": _NAMES,
        "parameters": _NAMES, "image_parameters": or_null(_NAMES), "default_steps": or_null(INTEGER),
        "default_size": or_null(_SIZE), "size_multiple": INTEGER, "size_most": or_null(INTEGER), "max_pixels": INTEGER,
        "max_steps": INTEGER, "max_batch": INTEGER, "max_images": INTEGER, "needs_image": {"type": "boolean"},
        "suggested": {"type": "object"}, "examples": _NAMES,
    }),
)  # fmt: skip
TICKS: Content = {"text/event-stream": {}}
"""Events whose data is JSON; docs/server.md says what stands in it."""

_TAKEN = exactly({"id": TEXT, "object": constant("request"), "seed": or_null({"type": "integer"})})
TAKEN = component("RequestsTaken", listed(_TAKEN))
HEADERS = {"steploom-channel": "Answer 202 at once, and send all events over the connection of that name (/v1/ticks)."}
