"""Findings: what an application's functions read and write, and what of that is kept from call to call."""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

from steploom.errors import raised

Key = tuple[str, Any]
"""``attribute``, ``content`` of one, ``object``, ``variable`` or ``cell``, and which."""


class Memory(NamedTuple):
    """What the application's code in a module keeps from call to call.

    Attributes:
        why: Which function keeps what.
        own: It is all on the module: each program may have a tree of its own. Else they run one after another.
    """

    why: str
    own: bool


class Findings:
    """What functions read, and what they write: what is in both is kept.

    Attributes:
        read: Functions with their objects that were read, and whether only as what looks on.
    """

    def __init__(self) -> None:
        self.read = set[tuple[int, int, bool]]()
        self._reads = set[Key]()
        self._writes: dict[Key, tuple[FunctionType, str, bool]] = {}
        self._lost: tuple[FunctionType, str] | None = None
        self._unread: str | None = None

    def reads(self, key: Key) -> None:
        """What is there counts for what is computed."""
        self._reads.add(key)

    def writes(self, key: Key, by: FunctionType, name: str, *, own: bool) -> None:
        """It is changed; ``own``: a tree of one's own has one of its own."""
        if own or key not in self._writes or self._writes[key][2]:
            was_own = key not in self._writes or self._writes[key][2]
            self._writes[key] = by, name, own and was_own

    def keyed(self, key: Key) -> None:
        """It is a table, of which something is set by a key that is no constant."""

    def loses(self, by: FunctionType, name: str) -> None:
        """It goes where it is not known what becomes of it."""
        self._lost = self._lost or (by, name)

    def cannot(self, part: Any, fault: Exception) -> None:
        """What ``part`` comes to could not be read."""
        self._unread = self._unread or f"{type(part).__name__} may keep something from call to call: {raised(fault)}"

    def forget(self, key: Key) -> None:
        """It does not count that this was changed."""
        self._writes.pop(key, None)

    def verdict(self) -> Memory | None:
        """What is kept, on the whole."""
        if self._unread is not None:
            return Memory(self._unread, own=False)
        both = [self._writes[key] for key in self._writes if key in self._reads]
        elsewhere = next(((by, name) for by, name, own in both if not own), self._lost)
        if elsewhere is not None:
            by, name = elsewhere
            return Memory(f"{by.__qualname__} may keep something in {name!r} from call to call", own=False)
        if both:
            return Memory(f"{both[0][0].__qualname__} keeps {both[0][1]!r} on the module from call to call", own=True)
        return None
