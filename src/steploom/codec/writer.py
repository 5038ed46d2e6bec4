"""From values to a header that msgspec can write, and payload frames."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from steploom.codec.pieces import LETTERS, PIECE, Long, Pieces
from steploom.codec.record import fields_of
from steploom.codec.rules import (
    INLINE_BYTES,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_HASHED,
    NUMPY_DTYPE,
    STRUCTS,
    Buffer,
    Code,
    dotted_root,
)
from steploom.errors import InvalidRequest, SteploomError
from steploom.given import is_whole
from steploom.protocol import ErrorInfo
from steploom.requests import DiffusionRequest

MEND = "cannot travel to a worker process; use distributed_executor_backend='inproc'"
_type_of: Callable[[object], type] = type
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


class Unfit(Exception):
    """A value that cannot travel. The path to it is put together on the way out, so that good values pay nothing."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = ""

    def under(self, part: str) -> Unfit:
        """Itself, seen from one level further out."""
        self.path = part + self.path
        return self


def _is_kind(hint: Any, base: type) -> bool:
    return isinstance(hint, type) and issubclass(hint, base)


@functools.cache
def _open_fields(kind: type[msgspec.Struct]) -> dict[str, bool]:
    """Fields of ``kind`` that msgspec alone would not carry, and whether only the value says what it is.

    That is so if the field is declared ``Any`` or as an error; else it holds structs or requests as declared, which are
    written without a tag, since the reader knows what to expect.
    """
    fields: dict[str, bool] = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = [hint, *typing.get_args(hint)]
        if any(part is DiffusionRequest or (_is_kind(part, msgspec.Struct) and _open_fields(part)) for part in parts):
            fields[name] = False
        elif any(part is Any or _is_kind(part, Exception) for part in parts):
            fields[name] = True
    return fields


class Writer:
    """Turns one value into a header; payloads go to ``frames`` (None: only check that they could)."""

    def __init__(self, frames: list[Buffer] | None, packages: Sequence[str]) -> None:
        self._frames = frames
        self._packages = packages
        self._integers = 0
        self._generators: dict[int, int] = {}  # places by id
        self._pieces = Pieces()
        self._tag = self._pieces.tagged
        self._weight = 0  # values in lists and mappings that are complete

    def header(self, value: Any) -> bytes:
        """The header of ``value``.

        Raises:
            InvalidRequest: Something in it cannot travel.
        """
        try:
            known = isinstance(value, msgspec.Struct | DiffusionRequest)
            return self._pieces.whole(self._declared(value) if known else self.pack(value))
        except Unfit as unfit:
            path = unfit.path.lstrip(".") or type(value).__name__
            raise InvalidRequest(f"{path}: {unfit.reason}", field=path) from None

    def _declared(self, value: Any) -> Any:
        """``value`` where the reader knows its type."""
        if isinstance(value, msgspec.Struct):
            changed: dict[str, Any] = {}
            for name, is_any in _open_fields(type(value)).items():
                old = getattr(value, name)
                if old is not None:
                    changed[name] = self._under(f".{name}", self.pack if is_any else self._declared, old)
            return msgspec.structs.replace(value, **changed) if changed else value
        if isinstance(value, DiffusionRequest):
            return self._request(value)
        if type(value) is list:
            items = typing.cast("list[Any]", value)
            return [self._under(f"[{i}]", self._declared, item) for i, item in enumerate(items)]
        return self.pack(value)

    def _under(self, part: str, write: Callable[[Any], Any], value: Any) -> Any:
        try:
            return write(value)
        except Unfit as unfit:
            raise unfit.under(part) from None

    def _request(self, request: DiffusionRequest) -> dict[str, Any]:
        """The request's fields. A message about one starts at the field, wherever the request stands."""
        own: dict[str, Any] = {"params": {}}
        name = ""
        try:
            for name in (field.name for field in dataclasses.fields(request) if field.name != "params"):
                own[name] = self._under(name, self.pack, getattr(request, name))
            msgspec.convert(own, DiffusionRequest)  # what the worker will insist on
            for name, value in request.params.items():
                own["params"][name] = self._under(f"params[{name!r}]", self.pack, value)
        except Unfit as unfit:
            raise InvalidRequest(f"{unfit.path}: {unfit.reason}", field=name) from None
        except msgspec.ValidationError as error:
            name = re.split(r"[.\[`]", str(error).partition("`$.")[2])[0]
            raise InvalidRequest(f"{name}={getattr(request, name, None)!r}: {error}", field=name) from None
        return own

    def pack(self, value: Any, depth: int = 0) -> Any:
        """``value`` where nothing is known about its type, for msgspec to write.

        Raises:
            Unfit: It cannot travel.
        """
        kind = _type_of(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is str:
            self._weight += len(value) // LETTERS
            return _text(value)
        if kind is int:
            return value if -(2**63) <= value < 2**64 else self._integer(value)
        if depth > MAX_DEPTH:
            raise Unfit(f"is nested deeper than {MAX_DEPTH} levels")
        if kind is list:
            return self._items(value, depth)
        if kind is dict:
            return self._entries(value, depth)
        return self._builtin(value, kind, depth)

    def _integer(self, value: int) -> Any:
        self._integers += 1
        if self._integers > MAX_HASHED:
            raise Unfit(f"more than {MAX_HASHED} integers beyond 64 bits cannot travel; give an array or text")
        return self._tag(Code.INTEGER, hex(value))

    def _items(self, values: Iterable[Any], depth: int) -> Any:
        packed: list[Any] = []
        long, weight = None, self._weight
        try:
            for value in values:
                packed.append(self.pack(value, depth + 1))
                if len(packed) + self._weight - weight >= PIECE:
                    long = long or Long(self._pieces)
                    long.add(packed)
                    packed, weight = [], self._weight
        except Unfit as unfit:
            raise unfit.under(f"[{len(packed) + (long.number if long else 0)}]") from None
        self._weight += len(packed)
        return long.end(packed) if long else packed

    def _entries(self, values: Mapping[Any, Any], depth: int) -> Any:
        packed: dict[Any, Any] = {}
        long, weight, key = None, self._weight, None
        try:
            for key, value in values.items():
                if not (type(key) is str or (type(key) is int and -(2**63) <= key < 2**63)):
                    raise Unfit(f"{_name(key)} as a key {MEND}")
                packed[_text(key) if type(key) is str else key] = self.pack(value, depth + 1)
                if len(packed) + self._weight - weight >= PIECE:
                    long = long or Long(self._pieces)
                    long.add(packed)
                    packed, weight = {}, self._weight
        except Unfit as unfit:
            raise unfit.under(f"[{key!r}]") from None
        self._weight += len(packed)
        return long.end(packed) if long else packed

    def _builtin(self, value: Any, kind: type, depth: int) -> Any:
        """Built-in types that msgpack does not have."""
        if kind is tuple:
            return self._tag(Code.TUPLE, self._items(value, depth))
        if kind is set or kind is frozenset:
            if len(value) > MAX_HASHED:
                raise Unfit(f"a set of more than {MAX_HASHED} items cannot travel; give a list")
            return self._tag(Code.SET if kind is set else Code.FROZENSET, self._items(value, depth))
        if kind is complex:
            return self._tag(Code.COMPLEX, [value.real, value.imag])
        if kind is bytes or kind is bytearray or kind is memoryview:
            return self._bytes(value)
        return self._library(value, kind, depth)

    def _bytes(self, value: Buffer) -> Any:
        flat = memoryview(value)
        if flat.nbytes <= INLINE_BYTES or not flat.contiguous:
            return bytes(flat)
        return self._tag(Code.BYTES, self._frame(lambda: flat.cast("B")))

    def _library(self, value: Any, kind: type, depth: int) -> Any:
        """Types of torch, numpy and PIL: whoever holds such a value has imported its library."""
        torch, numpy, image = (_loaded(name) for name in ("torch", "numpy", "PIL.Image"))
        if torch is not None:
            if isinstance(value, torch.Tensor):
                return self._tensor(value, torch)
            if isinstance(value, torch.Size):
                return self._tag(Code.TUPLE, list(value))
            if isinstance(value, torch.dtype):
                return self._tag(Code.TORCH_DTYPE, str(value).removeprefix("torch."))
            if isinstance(value, torch.device):
                return self._tag(Code.TORCH_DEVICE, str(value))
            if isinstance(value, torch.Generator):
                return self._tag(Code.GENERATOR, self._generator(value))
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            return self._array(value, numpy)
        if image is not None and isinstance(value, image.Image):
            return self._image(value)
        return self._own(value, kind, depth)

    def _own(self, value: Any, kind: type, depth: int) -> Any:
        """Types of this library, and dataclasses of the permitted packages."""
        if isinstance(value, DiffusionRequest):
            return self._tag(Code.REQUEST, self._request(value))
        if isinstance(value, msgspec.Struct) and STRUCTS.get(kind.__name__) is kind:
            fields = {name: getattr(value, name) for name in value.__struct_fields__}
            return self._tag(Code.STRUCT, [kind.__name__, self._fields(fields, depth)])
        if isinstance(value, SteploomError):
            return self._tag(Code.ERROR, ErrorInfo.of(value, "".join(traceback.format_exception(value))))
        if dotted_root(kind.__module__) in self._packages and "<" not in kind.__qualname__:
            fields = fields_of(value)
            if fields is not None:
                return self._tag(Code.DATACLASS, [kind.__module__, kind.__qualname__, self._fields(fields, depth)])
        return self._subclass(value, depth)

    def _fields(self, values: Mapping[str, Any], depth: int) -> dict[str, Any]:
        return {
            name: self._under(f".{name}", lambda item: self.pack(item, depth + 1), item)
            for name, item in values.items()
        }

    def _subclass(self, value: Any, depth: int) -> Any:
        """Subclasses of plain types travel as the plain type: OrderedDict, FrozenDict, enumerations of text."""
        if isinstance(value, int):
            return self.pack(int.__int__(value), depth)
        if isinstance(value, float):
            return self.pack(float.__float__(value), depth)
        if isinstance(value, str):
            return self.pack("".join(value), depth)
        if isinstance(value, dict):
            return self._entries(typing.cast("dict[Any, Any]", value), depth)
        if isinstance(value, list):
            return self._items(typing.cast("list[Any]", value), depth)
        raise Unfit(f"{_name(value)} {_mend(value)}")

    def _frame(self, payload: Callable[[], Buffer]) -> int:
        """Index of a new frame that holds ``payload()``."""
        if self._frames is None:
            return 0
        try:
            self._frames.append(payload())
        except Exception as error:  # the process boundary: an image or tensor may raise anything when it is read
            raise Unfit(f"its content cannot be read: {type(error).__name__}: {error}") from error
        return len(self._frames) - 1

    def _tensor(self, value: Any, torch: Any) -> Any:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise Unfit(f"a tensor that is sparse, quantized, nested or on the meta device {MEND}")
        if value.dim() > MAX_DIMENSIONS:
            raise Unfit(f"a tensor of more than {MAX_DIMENSIONS} dimensions cannot travel; reshape it")

        def payload() -> Buffer:
            if not value.numel():  # torch may give it strides that forbid a view
                return b""
            plain = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            return plain.reshape(-1).view(torch.uint8).numpy().data

        dtype = str(value.dtype).removeprefix("torch.")
        return self._tag(Code.TENSOR, [self._frame(payload), dtype, list(value.shape)])

    def _generator(self, value: Any) -> Any:
        """What draws from one generator in several places does so on the other side."""
        if id(value) in self._generators:
            return [self._generators[id(value)], None]
        self._generators[id(value)] = len(self._generators)
        return [self._frame(lambda: value.get_state().numpy().data), value.device.type]

    def _array(self, value: Any, numpy: Any) -> Any:
        dtype: str = value.dtype.str
        masked = numpy.ma.isMaskedArray(value) if isinstance(value, numpy.ndarray) else False
        if not NUMPY_DTYPE.fullmatch(dtype) or masked:
            raise Unfit(f"a numpy array of {'masked values' if masked else f'dtype {value.dtype}'} {MEND}")
        if isinstance(value, numpy.generic):
            return self._tag(Code.SCALAR, [dtype, value.tobytes()])

        def payload() -> Buffer:
            return numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8).data

        return self._tag(Code.ARRAY, [self._frame(payload), dtype, list(value.shape)])

    def _image(self, value: Any) -> Any:
        palette = value.getpalette() if value.mode in ("P", "PA") else None
        frame = self._frame(value.tobytes)
        return self._tag(Code.IMAGE, [frame, value.mode, list(value.size), None if palette is None else bytes(palette)])


def _loaded(name: str) -> Any:
    """A library, if something has imported all of it; another thread may be about to."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def _text(value: str) -> str:
    if not is_whole(value):
        raise Unfit("text with a lone surrogate has no UTF-8 form; remove it")
    return value


def _name(value: object) -> str:
    if isinstance(value, _FUNCTIONS):
        return "a function"
    if isinstance(value, types.GeneratorType):
        return "a Python generator"
    kind = type(value)
    return f"an object of type {kind.__module__}.{kind.__qualname__}"


def _mend(value: object) -> str:
    if type(value).__name__ == "Generator" and dotted_root(type(value).__module__) == "numpy":
        return MEND.replace("use ", "give seed= instead, or use ")
    return MEND
