"""What a route says of itself, beside its endpoint, for the OpenAPI document.

A route without it stands in the document too, only with less::

    @operation(answers={200: as_json(component("Thing", {...}))}, errors=(404,))
    async def thing(request: Request) -> Response:
        \"\"\"The first line is the summary.\"\"\"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from steploom.server.state import ServerState

Content = Mapping[str, Any]
"""JSON Schemas by media type."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """What an endpoint takes and answers.

    Attributes:
        answers: Bodies of answers by status; media types and their schemas. An empty one is no body.
        errors: Statuses that are answered with the error object; 400 and 500 go without saying.
        body: The body that it takes, with the bounds of a server.
        body_required: Whether there must be one.
        headers: Optional headers of requests that mean something, and what.
        query: JSON Schemas of parameters in the address; none of them is required.
    """

    answers: Mapping[int, Content] = dataclasses.field(default_factory=lambda: {200: {"*/*": {}}})
    errors: tuple[int, ...] = ()
    body: Callable[[ServerState], Content] | None = None
    body_required: bool = True
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    query: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


ERRORS = (404, 413, 415, 422, 429, 499, 503, 504)
"""Of routes whose requests the engine works on."""

HEADERS = {"Idempotency-Key": "The same request with the same key joins the first one."}
"""Of the same."""

UNDESCRIBED = Operation()
_OPERATIONS: dict[Any, Operation] = {}


def operation(**described: Any) -> Callable[[Endpoint], Endpoint]:
    """Decorates an endpoint with what it takes and answers: fields of :class:`Operation`."""

    def keep(endpoint: Endpoint) -> Endpoint:
        _OPERATIONS[endpoint] = Operation(**described)
        return endpoint

    return keep


def operation_of(endpoint: Any) -> Operation:
    """What is known of an endpoint."""
    return _OPERATIONS.get(endpoint, UNDESCRIBED)


def as_json(schema: Any) -> Content:
    """The content of JSON bodies."""
    return {"application/json": schema}
