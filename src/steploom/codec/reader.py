"""From header and payload frames back to values. Everything is checked: damaged frames are a ProtocolError."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec

from steploom.codec.keys import check_keys
from steploom.codec.record import imported_class, stand_in
from steploom.codec.rules import MAX_DIMENSIONS, MAX_HASHED, NUMPY_DTYPE, STRUCTS, Buffer, Code, dotted_root
from steploom.errors import ProtocolError
from steploom.protocol import ErrorInfo
from steploom.requests import DiffusionRequest

_Size = Annotated[int, msgspec.Meta(ge=0)]
_Numbers = tuple[_Size, str, Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]]
_Generator = tuple[_Size, str | None]
_Image = tuple[_Size, str, tuple[_Size, _Size], bytes | None]
_DAMAGE = (msgspec.MsgspecError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError,
           RuntimeError, MemoryError, OSError)  # fmt: skip
"""What msgspec, numpy, torch, PIL and constructors raise when they are fed damaged data."""


def read(frames: Sequence[Buffer], kind: Any, packages: Sequence[str]) -> Any:
    """The value of type ``kind`` in ``frames``; see :func:`steploom.codec.decode`."""
    reader = _Reader(frames, packages)
    try:
        check_keys(frames[0])
        value = msgspec.msgpack.decode(frames[0], type=kind, ext_hook=reader.extension, dec_hook=_built_already)
    except _DAMAGE as error:
        raise ProtocolError(f"a message cannot be decoded: {type(error).__name__}: {error}") from None
    if len(reader.used) != len(frames) - 1:
        raise ProtocolError(f"a message has {len(frames) - 1} payload frames and refers to {len(reader.used)}")
    return value


def _built_already(kind: type, value: Any) -> Any:
    """Types unknown to msgspec were built by the extension hook; msgspec itself checks that it is a ``kind``."""
    return value


class _Reader:
    """Builds what the extensions of one header stand for."""

    def __init__(self, frames: Sequence[Buffer], packages: Sequence[str]) -> None:
        self.used: set[int] = set()
        self._integers = 0
        self._generators: list[Any] = []
        self._frames = frames
        self._packages = packages

    def extension(self, code: int, data: memoryview) -> Any:
        """The value of one extension (msgspec's ``ext_hook``)."""
        return _READERS[Code(code)](self, data)

    def _value(self, data: memoryview, kind: Any = Any) -> Any:
        return msgspec.msgpack.decode(data, type=kind, ext_hook=self.extension, dec_hook=_built_already)

    def _payload(self, index: int, nbytes: int | None = None) -> memoryview:
        """Frame ``index``, writable, of ``nbytes`` bytes."""
        if not 0 < index < len(self._frames) or index in self.used:
            raise ProtocolError(f"payload frame {index} of {len(self._frames) - 1} is missing or used twice")
        self.used.add(index)
        frame = memoryview(self._frames[index]).cast("B")
        if nbytes is not None and frame.nbytes != nbytes:
            raise ProtocolError(f"payload frame {index} has {frame.nbytes} bytes instead of {nbytes}")
        return memoryview(bytearray(frame)) if frame.readonly else frame

    def _tuple(self, data: memoryview) -> Any:
        return tuple(self._value(data, list[Any]))

    def _set(self, data: memoryview) -> Any:
        return set(self._hashed(data))

    def _frozenset(self, data: memoryview) -> Any:
        return frozenset(self._hashed(data))

    def _hashed(self, data: memoryview) -> list[Any]:
        return self._value(data, Annotated[list[Any], msgspec.Meta(max_length=MAX_HASHED)])

    def _integer(self, data: memoryview) -> Any:
        self._integers += 1
        if self._integers > MAX_HASHED:
            raise ProtocolError(f"a message has more than {MAX_HASHED} integers beyond 64 bits")
        return int(self._value(data, str), 16)

    def _complex(self, data: memoryview) -> Any:
        return complex(*self._value(data, tuple[float, float]))

    def _bytes(self, data: memoryview) -> Any:
        return bytes(self._payload(self._value(data, int)))

    def _tensor(self, data: memoryview) -> Any:
        index, name, shape = self._value(data, _Numbers)
        torch: Any = importlib.import_module("torch")
        dtype = _torch_dtype(torch, name)
        payload = self._payload(index, math.prod(shape) * dtype.itemsize)
        if not payload.nbytes:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(payload, dtype=torch.uint8)
        if flat.data_ptr() % dtype.itemsize:  # small frames lie anywhere in ZMQ's receive buffer
            flat = flat.clone()
        return flat.view(dtype).reshape(shape)

    def _array(self, data: memoryview) -> Any:
        index, name, shape = self._value(data, _Numbers)
        numpy: Any = importlib.import_module("numpy")
        dtype = _numpy_dtype(numpy, name)
        payload = self._payload(index, math.prod(shape) * dtype.itemsize)
        if not payload.nbytes:
            return numpy.empty(shape, dtype)
        array = numpy.frombuffer(payload, dtype)
        return (array if array.flags.aligned else array.copy()).reshape(shape)

    def _scalar(self, data: memoryview) -> Any:
        name, number = self._value(data, tuple[str, bytes])
        numpy: Any = importlib.import_module("numpy")
        return numpy.frombuffer(number, _numpy_dtype(numpy, name)).reshape(())[()]

    def _image(self, data: memoryview) -> Any:
        index, mode, (width, height), palette = self._value(data, _Image)
        image: Any = importlib.import_module("PIL.Image")
        kind: Any = importlib.import_module("PIL.ImageMode").getmode(mode)
        # PIL allocates before it compares: say first how many bytes belong to this size (mode "1" packs eight pixels)
        row = (width + 7) // 8 if mode == "1" else width * len(kind.bands) * int(kind.typestr[2:])
        made = image.frombytes(mode, (width, height), self._payload(index, row * height))
        if palette is not None:
            made.putpalette(palette)
        return made

    def _torch_dtype(self, data: memoryview) -> Any:
        return _torch_dtype(importlib.import_module("torch"), self._value(data, str))

    def _torch_device(self, data: memoryview) -> Any:
        torch: Any = importlib.import_module("torch")
        return torch.device(self._value(data, str))

    def _generator(self, data: memoryview) -> Any:
        index, device = self._value(data, _Generator)
        if device is None:
            return self._generators[index]
        torch: Any = importlib.import_module("torch")
        made = torch.Generator(device)
        made.set_state(torch.frombuffer(bytearray(self._payload(index)), dtype=torch.uint8))
        self._generators.append(made)
        return made

    def _dataclass(self, data: memoryview) -> Any:
        module, qualname, fields = self._value(data, tuple[str, str, dict[str, Any]])
        root = dotted_root(module)
        if root not in self._packages:
            raise ProtocolError(f"a dataclass of {module} has no business here")
        if root in sys.modules:  # else importing it would block the event loop for seconds
            with contextlib.suppress(ImportError):  # only the worker has it: remote code, another version
                importlib.import_module(module)
        kind: Any = imported_class(module, qualname)
        if kind is None:
            return stand_in(module, qualname)(fields)
        if not hasattr(kind, "__dataclass_fields__"):
            raise ProtocolError(f"{module}.{qualname} is not a dataclass")
        return kind(**fields)

    def _struct(self, data: memoryview) -> Any:
        name, fields = self._value(data, tuple[str, dict[str, Any]])
        return msgspec.convert(fields, STRUCTS[name], dec_hook=_built_already)

    def _request(self, data: memoryview) -> Any:
        return self._value(data, DiffusionRequest)

    def _error(self, data: memoryview) -> Any:
        return self._value(data, ErrorInfo).exception()


def _torch_dtype(torch: Any, name: str) -> Any:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"torch has no dtype {name!r}")
    return dtype


def _numpy_dtype(numpy: Any, name: str) -> Any:
    if not NUMPY_DTYPE.fullmatch(name):
        raise ProtocolError(f"numpy's dtype {name!r} does not travel")
    return numpy.dtype(name)


_READERS: dict[Code, Callable[[_Reader, memoryview], Any]] = {
    code: getattr(_Reader, f"_{code.name.lower()}") for code in Code
}
