"""What a server says of itself: models, requests, health."""

from __future__ import annotations

from steploom.server.openapi.components import INTEGER, NUMBER, TEXT, component, constant, exactly, listed, or_null

_MODEL = exactly(
    {"id": TEXT, "object": constant("model"), "created": INTEGER, "owned_by": TEXT, "parent": TEXT}, "parent"
)
MODEL = component("Model", _MODEL)
MODELS = component("Models", listed(MODEL))
REQUEST = component(
    "Request",
    exactly({
        "id": TEXT, "object": constant("request"), "created": INTEGER,
        "status": {"enum": ["queued", "running", "completed"]}, "queue_position": or_null(INTEGER), "step": INTEGER,
        "num_inference_steps": or_null(INTEGER), "batch_requests": NUMBER, "seed": or_null({"type": "integer"}),
        "priority": {"type": "integer"}, "user": or_null(TEXT), "attempt": INTEGER, "age_s": NUMBER,
    }),
)  # fmt: skip
REQUESTS = component("Requests", listed(REQUEST))
CANCELLED = component(
    "Cancelled", exactly({"id": TEXT, "object": constant("request.cancelled"), "cancelled": constant(True)})
)
LIVE = exactly({"status": constant("live")})
READY = exactly({"status": constant("ready")})
HEALTHY = exactly({"status": constant("healthy"), "requests": INTEGER})
RECOVERING = exactly({"status": constant("recovering"), "why": TEXT, "requests": INTEGER})
NOT_READY = component("NotReady", exactly({"status": constant("not ready"), "why": TEXT}))
