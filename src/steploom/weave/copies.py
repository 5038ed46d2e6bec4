"""Woven copies: what a program sees in place of the pipeline and its modules. The originals are never modified.

A woven module is a shallow copy of a shared one whose ``forward`` (``encode``, ``decode``) suspends the program. What a
pipeline does *to* a module while it runs, such as ``vae.to(float32)`` around a decode (SDXL's ``force_upcast``) or
other attention processors (PAG, IP-Adapter), happens to a *variant*: a structural clone that shares the parameters.
Calls of equal variants can be merged, and a cancelled program leaves nothing behind on the model.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steploom.weave import signatures, untyped
from steploom.weave.batching.alike import wrapped_as_asked
from steploom.weave.callbacks import within_callback
from steploom.weave.forms import Form, formed_call
from steploom.weave.modules.kept import keep
from steploom.weave.modules.shared import HOOK_TABLES, METHODS, SharedModule, Target, clone_tree, own_processors
from steploom.weave.modules.switches import Switches
from steploom.weave.order import is_denoiser
from steploom.weave.program import note_unshared, suspend, why_alone

if TYPE_CHECKING:
    from steploom.weave.lora.blend import View

_SERIALS = itertools.count(1)
_NOT_INHERITED = (*METHODS, "_hf_hook", "_old_forward", "_diffusers_hook")
_READERS = ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer")
_WALKERS = ("modules", "named_modules", "children", "named_children", "get_submodule")
_CHANGERS = ("apply", "set_attn_processor", "set_default_attn_processor")
_MUTATORS = ("enable_", "disable_", "fuse_", "unfuse_", "set_adapter", "load_", "unload_", "add_adapter")


class Woven:
    """What one program sees of one shared module: which variant its calls run.

    Args:
        shared: The module.
        view: The same with the request's adapters, if it has any.

    Attributes:
        inner: What is woven deep inside of it, and its path there.
    """

    def __init__(self, shared: SharedModule, view: View | None = None) -> None:
        self.shared = shared
        self.inner: tuple[str, Any] | None = None
        self.view = view
        self.home: nn.Module = shared.origin if view is None else view.module
        self.current: nn.Module = self.home
        self.private: nn.Module | None = None
        self._fusible: nn.Module | None = None
        self._own: Hashable = None
        self._conversion: Hashable = ()
        self._switches: Switches | None = None
        self._forms: OrderedDict[Hashable, list[Form]] = OrderedDict()
        if shared.remembers is not None and shared.remembers.own:
            self.private = self.current = shared.own_tree(self.home)
            self.isolate()

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Suspends the program until the hub has run this call; at once where it cannot be shared."""
        target, reason = self.target(method), why_alone() or (self.shared.remembers and self.shared.remembers.why)
        if method == "forward" and self._writes_cache(target, kwargs):
            kwargs.setdefault("use_cache", False)  # nobody reads its cache, which has no rows
        if reason is None and self.shared.hooked_by_pipeline():
            reason = "the pipeline has put a hook on a part of the module"
        if reason is not None:
            note_unshared(target.name, reason)
            return self.having_run(target.invoke(*args, **kwargs))
        wrap = kwargs.pop("return_dict", True) if method == "forward" and wrapped_as_asked(self.shared.origin) else True
        output = self.having_run(suspend(formed_call(target, args, kwargs, self._forms)))
        return output if wrap else output.to_tuple()

    def having_run(self, output: Any) -> Any:
        """``output``, of a call: what it has left behind on the program's own clone is no change of the program's."""
        if self._switches is not None:
            self._switches.ran()
        return output

    def _writes_cache(self, target: Target, kwargs: dict[str, Any]) -> bool:
        """Whether this call would fill a cache for nobody: of a language model that encodes, or sees the whole text."""
        if "past_key_values" in kwargs or (is_denoiser(target.name) and self.shared.language is None):
            return False
        return signatures.takes(self.shared.origin.forward, "use_cache")

    def target(self, method: str) -> Target:
        """What a call of ``method`` runs now."""
        variant = self._variant()
        if not variant:
            return (self.shared if self.view is None else self.view).targets[method]
        group = (id(self.shared.base), method, variant)
        key = group if self.view is None else (*group, self.view.key)
        return Target(self.shared.name, method, self.current, key, group=group, language=self.shared.language)

    def _variant(self) -> Hashable:
        """What distinguishes this view from the shared module: equal variants compute the same."""
        if self.private is None:
            return self._conversion
        switched = () if self._switches is None else self._switches.changed()
        return (self._conversion, switched, self._own) if switched or self._own is not None else self._conversion

    def privatize(self) -> nn.Module:
        """A clone of the module tree that this program may change."""
        if self.private is None:
            self.private = own_processors(clone_tree(self.current))
            self._switches = Switches(self.private)
            self.current = self.private
        return self.private

    def own_adapted_weights(self) -> None:
        """Gives the program's clone weights of its own where it has adapters: to fuse these writes into the weights."""
        if self._fusible is self.privatize():
            return
        self._fusible = self.private
        for layer in untyped.tuner_layers(self.privatize()).values():
            for part in layer.modules():
                own: dict[str, Any] = part.__dict__["_parameters"]
                own.update({name: copied(p) for name, p in own.items() if type(p) is nn.Parameter})

    def shown_as_is(self) -> bool:
        """Whether the program sees the parts that everybody's calls run, since the module cannot be cloned."""
        if self.private is not None or self.shared.pliable:
            return False
        keep(self.current)
        return True

    def convert(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        """``module.to(...)``: this view moves to a converted variant, or back to the shared module."""
        dtype, home = dtype or self.current_dtype, self.shared.device
        if device is None or (home is not None and device.type == home.type and device.index in (None, home.index)):
            device = home
        away = (dtype, device) != (self.shared.dtype, self.shared.device)
        if self.private is not None or (away and self.view is not None):
            self.private = self.current = clone_tree(self.current, own_parameters=True).to(device=device, dtype=dtype)
            self._switches = Switches(self.private)
            self.isolate()
        elif not away:
            self.current, self._conversion = self.home, ()
        else:
            self.current, self._conversion = self.shared.converted(dtype, device), (dtype, device)

    @property
    def current_dtype(self) -> torch.dtype | None:
        """The dtype that the program sees."""
        return self.shared.dtype if self.current is self.home else getattr(self.current, "dtype", None)

    def isolate(self) -> None:
        """The program has changed its clone in a way that nobody else's is compared with."""
        self._own = next(_SERIALS)


def copied(parameter: nn.Parameter) -> nn.Parameter:
    """The same in storage of its own."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def woven_module(shared: SharedModule, view: View | None = None) -> Any:
    """A woven copy of a shared module, for one program; with the adapters of ``view``, if the request has any."""
    state = Woven(shared, view)
    cls = _woven_class(type(state.home))
    copy = object.__new__(cls)
    own = state.home.__dict__.items()  # a function in the place of one of our methods is called by that, on the module
    copy.__dict__.update({k: v for k, v in own if k not in _NOT_INHERITED and k not in vars(cls)})
    copy.__dict__.update({table: OrderedDict() for table in HOOK_TABLES}, _compiled_call_impl=None)
    copy.__dict__["_steploom"] = state
    _adopt(copy)
    return copy


def is_woven(value: Any) -> bool:
    """Whether ``value`` is a woven copy of a module."""
    return issubclass(type(value), nn.Module) and isinstance(value.__dict__.get("_steploom"), Woven)


def weave_inside(copy: Any, path: str, shared: SharedModule) -> None:
    """Replaces a module deep inside a woven copy by a woven copy of its own."""
    copy._steploom.inner = (path, woven_module(shared))
    _adopt(copy)


def _adopt(copy: Any) -> None:
    """Shows the current variant's children, parameters and buffers on the woven copy, in tables of its own."""
    current, inner = copy._steploom.current, copy._steploom.inner
    for table in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[table] = current.__dict__[table].copy()
    if inner is None:
        return
    parent, (*way, last) = copy, inner[0].split(".")
    for name in way:
        child = parent._modules[name]
        own = object.__new__(type(child))
        own.__dict__.update(child.__dict__, _modules=child._modules.copy())
        parent._modules[name] = parent = own
    parent._modules[last] = inner[1]


@functools.cache
def _woven_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls`` with the same name, whose calls suspend and whose changes stay with the program."""
    members: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members |= {name: _suspending(cls, name) for name in METHODS if hasattr(cls, name)}
    members |= {name: _delegating(cls, name) for name in (*_READERS, *_WALKERS, *_CHANGERS) if hasattr(cls, name)}
    members |= {name: _delegating(cls, name) for name in dir(cls) if name.startswith(_MUTATORS)}
    members |= {
        "to": _to,
        "half": lambda self: _to(self, torch.float16),
        "float": lambda self: _to(self, torch.float32),
        "bfloat16": lambda self: _to(self, torch.bfloat16),
        "__setattr__": _setattr,
        "__getattr__": _getattr(cls),
        "dtype": property(lambda self: self._steploom.current_dtype),
        "device": property(lambda self: self._steploom.shared.device),
    }
    if hasattr(cls, "forward"):
        members["__call__"] = _call
    if hasattr(cls, "generate"):
        members["generate"] = _generate
    if hasattr(cls, "cache_context"):
        members["cache_context"] = _cache_context
    return type(cls.__name__, (cls,), members)


def _suspending(cls: type, name: str) -> Any:
    @functools.wraps(getattr(cls, name))  # pipelines read the signature of forward
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._steploom.call(name, args, kwargs)

    return method


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The call without what PyTorch does around it, where there is nothing to do: hooks run around the real module."""
    own = self.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:  # the pipeline's, on its own module
        return nn.Module.__call__(self, *args, **kwargs)
    return own["_steploom"].call("forward", args, kwargs)


def _delegating(cls: type, name: str) -> Any:
    """Readers look at the current variant; walkers get a private tree, since what they find may be changed.

    Walkers of a module that cannot be cloned get the shared one, on which the program may change nothing.
    """
    reader, mutator = name in _READERS, name not in (*_READERS, *_WALKERS, *_CHANGERS)

    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: Woven = self._steploom
        if reader or (name in _WALKERS and state.shown_as_is()):
            return getattr(state.current, name)(*args, **kwargs)
        if within_callback():
            state.own_adapted_weights()
        result = getattr(state.privatize(), name)(*args, **kwargs)
        if mutator:
            state.isolate()
        _adopt(self)
        return result

    return method


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, int, torch.device)):
            device = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
    self._steploom.convert(dtype, None if device is None else torch.device(device))
    _adopt(self)
    return self


def _getattr(cls: type[nn.Module]) -> Any:
    """Reading a part, which callbacks may change: they get one of the program's own clone."""

    def getattr_(self: Any, name: str) -> Any:
        if within_callback() and name in self.__dict__["_modules"]:
            state: Woven = self.__dict__["_steploom"]
            if state.private is None and not state.shown_as_is():
                state.privatize()
                _adopt(self)
        return cls.__getattr__(self, name)

    return getattr_


def _setattr(self: Any, name: str, value: Any) -> None:
    setattr(self._steploom.privatize(), name, value)
    _adopt(self)
    self.__dict__[name] = value


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A language model's own loop is one unmerged call."""
    note_unshared(self._steploom.shared.name, "generate() of a language model is one call")
    return self._steploom.having_run(self._steploom.current.generate(*args, **kwargs))


class _cache_context:  # noqa: N801 - stands in for a method
    """Stateful caches are refused at start, so there is no context to keep; see ``loading.refuse``."""

    def __init__(self, name: str, **kwargs: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...
