"""Dataclasses of packages that this process has not imported."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any


class Record(dict[str, Any]):
    """A pipeline's output in a process that has not imported diffusers (importing it takes seconds).

    It has the fields as attributes and, as diffusers' own ``BaseOutput``, is a dict of those that are not None, also by
    position. ``isinstance`` with the original class holds as soon as anybody has imported that class.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self.__dict__.update(fields)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self.values())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


def imported_class(module: str, qualname: str) -> type | None:
    """The class of that name if its module was imported by this process, else None."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and found.__module__ == module else None


@functools.lru_cache(maxsize=256)
def stand_in(module: str, qualname: str) -> type[Record]:
    """The subclass of :class:`Record` that stands for the class ``module.qualname``."""

    def real_class(self: Record) -> type:
        return imported_class(module, qualname) or type(self)

    namespace = {"__module__": module, "__qualname__": qualname, "__class__": property(real_class)}
    return type(qualname.rpartition(".")[2], (Record,), namespace)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass, or of what stands for one; None if ``value`` is neither."""
    if Record in type(value).__mro__:  # its __class__ is another's
        return value.__dict__
    if not dataclasses.is_dataclass(value):
        return None
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
