"""Whatever an application sets on its pipeline: it stays, is rebuilt, or refused by name, whatever code it has."""

from __future__ import annotations

import contextvars
import io
import socket
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import tiny
import torch

from steploom import ConfigError
from steploom.weave.pipelines import Loom
from steploom.weave.watching import Watcher


@pytest.fixture(scope="module", name="whole")
def _whole() -> Any:
    return tiny.sd3()


@pytest.fixture(name="pipe")
def _pipe(whole: Any) -> Iterator[Any]:
    held = {name: dict(vars(one)) for name, one in {"": whole, **whole.components}.items() if hasattr(one, "__dict__")}
    yield whole
    for name, had in held.items():
        one = getattr(whole, name) if name else whole
        for added in vars(one).keys() - had.keys():
            del one.__dict__[added]
    vars(whole).update(held[""])


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not so")


SPECIAL = ["__getattr__", "__getattribute__", "__deepcopy__", "__copy__", "__reduce_ex__", "__eq__", "__hash__",
           "__bool__", "__len__", "__iter__", "__repr__", "__setattr__", "__getstate__"]  # fmt: skip
CLASSES = [torch.nn.Module, str, type, types.MethodType, torch.Tensor]


def odd(pipe: Any, **members: Any) -> Any:
    own = type("Odd", (), {"__module__": __name__, **members})()
    object.__setattr__(own, "pipe", pipe)
    return own


def gone() -> Any:
    return weakref.proxy(type("Gone", (), {})())


def deep(pipe: Any) -> Any:
    for _ in range(3000):
        pipe = [pipe]
    return pipe


def own_thread(pipe: Any) -> Any:
    own = threading.local()
    own.pipe = pipe
    return own


REBUILT: dict[str, Callable[[Any], Any]] = {
    **{f"raises in {name}": lambda pipe, name=name: odd(pipe, **{name: raises}) for name in SPECIAL},
    **{f"says that it is a {cls.__name__}": lambda pipe, cls=cls: odd(pipe, __class__=property(lambda self: cls))
       for cls in CLASSES},
    "raises when asked for its class": lambda pipe: odd(pipe, __class__=property(raises)),
    "stands for the pipeline": lambda pipe: odd(
        pipe, __getattribute__=lambda self, name: getattr(object.__getattribute__(self, "pipe"), name)),
    "a mock": lambda pipe: MagicMock(pipe=pipe),
    "a weak proxy": weakref.proxy,
}  # fmt: skip
SOCKETS: list[socket.socket] = []
LEFT: dict[str, Callable[[Any], Any]] = {
    "a mock of a module": lambda pipe: MagicMock(spec=torch.nn.Module),
    "a dead proxy": lambda pipe: gone(),
    "a generator": lambda pipe: iter(range(3)),
    "a file": lambda pipe: io.BytesIO(),
    "a socket": lambda pipe: SOCKETS[0],
    "a lock": lambda pipe: threading.Lock(),
    "a module": lambda pipe: torch,
    "a torch generator": lambda pipe: torch.Generator(),
    "a thread's": lambda pipe: threading.local(),
    "a scripted module": lambda pipe: torch.jit.script(torch.nn.Linear(2, 2)),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a generator": (lambda pipe: (pipe for _ in range(3)), "a generator"),
    "a thread's": (own_thread, "a _local"),
    "a context variable": (lambda pipe: contextvars.ContextVar("own", default=pipe), "a ContextVar"),
    "within an object": (lambda pipe: types.SimpleNamespace(inner=iter([pipe])), "a list_iterator"),
    "deep": (deep, "RecursionError"),
}  # fmt: skip
UNCOPIED: dict[str, Callable[[Any], Any]] = {
    "a thread's": lambda pipe: threading.local(),
    "a generator": lambda pipe: (one for one in range(3)),
    "what raises": lambda pipe: odd(None, __deepcopy__=raises),
}


@pytest.fixture(autouse=True)
def a_socket() -> Iterator[None]:
    with socket.socket() as made:
        SOCKETS[:] = [made]
        yield


def own_of(pipe: Any) -> Any:
    """The pipeline of a request."""
    watcher = Watcher()
    try:
        return Loom(pipe, isolated=True).thread_pipeline(watcher)
    finally:
        watcher.close()


@pytest.mark.parametrize("name", REBUILT)
def test_it_is_rebuilt(pipe: Any, name: str) -> None:
    pipe.__dict__["odd"] = given = REBUILT[name](pipe)
    own = own_of(pipe)
    made = own.__dict__["odd"]
    assert made is not given
    assert type(made) is type(given)
    if type(made) not in weakref.ProxyTypes:
        assert object.__getattribute__(made, "__dict__").get("pipe", own) is own


@pytest.mark.parametrize("name", LEFT)
def test_it_stays(pipe: Any, name: str) -> None:
    pipe.__dict__["odd"] = given = LEFT[name](pipe)
    assert own_of(pipe).__dict__["odd"] is given


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(pipe: Any, name: str) -> None:
    make, said = REFUSED[name]
    pipe.__dict__["odd"] = make(pipe)
    with pytest.raises(ConfigError, match=rf"^pipe\.odd{'.inner' if 'object' in name else ''} was set .*{said}"):
        own_of(pipe)


@pytest.mark.parametrize("name", UNCOPIED)
@pytest.mark.parametrize("where", ["scheduler", "tokenizer"])
def test_what_cannot_be_copied_is_refused_by_name(pipe: Any, where: str, name: str) -> None:
    holder = getattr(pipe, where)
    holder.__dict__["odd"] = UNCOPIED[name](pipe)
    with pytest.raises(ConfigError, match=rf"pipeline's {type(holder).__name__}, and its attribute 'odd' cannot be"):
        own_of(pipe)


@pytest.mark.parametrize("where", ["scheduler", "tokenizer", "transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("name", ["a lock", "a file", "a socket", "a module"])
def test_what_is_nobodys_own_stays_on_the_parts(pipe: Any, where: str, name: str) -> None:
    getattr(pipe, where).__dict__["odd"] = given = LEFT[name](pipe)
    assert getattr(own_of(pipe), where).__dict__["odd"] is given


class Wrapper:
    """Stands for a noise scheduler, and cannot be copied by halves."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def step(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.step(output * 0.9, *args, **kwargs)


def test_a_noise_scheduler_that_cannot_be_copied(pipe: Any) -> None:
    pipe.__dict__["scheduler"] = Wrapper(pipe.scheduler)
    with pytest.raises(ConfigError, match=r"pipeline's Wrapper, and it cannot be copied \(KeyError: 'inner'\): keep"):
        own_of(pipe)
