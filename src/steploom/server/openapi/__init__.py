"""The OpenAPI document of a server, made of its routes, what they say of themselves, and the tables of fields."""

from __future__ import annotations

from steploom.server.openapi.components import ERROR, component
from steploom.server.openapi.document import document, openapi
from steploom.server.openapi.operation import Content, Operation, as_json, operation

__all__ = ["ERROR", "Content", "Operation", "as_json", "component", "document", "openapi", "operation"]
