"""Shared modules: what module calls run. One per top-level module of the user's pipeline, and its variants."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steploom.errors import raised
from steploom.weave import exits
from steploom.weave.modules.compiled import is_compiled
from steploom.weave.modules.findings import Memory
from steploom.weave.modules.kept import CONTAINERS, DEEPEST, unclonable
from steploom.weave.modules.offloading import LEFT_OUT, only_offloaded
from steploom.weave.modules.rebinding import settle_parts
from steploom.weave.modules.remembering import is_patched, remembers
from steploom.weave.modules.structure import ModuleStructure, Token
from steploom.weave.modules.switches import library_settings
from steploom.weave.order import is_denoiser
from steploom.weave.ragged.language import LanguageRule
from steploom.weave.ragged.rules import Rule, rule_for

if TYPE_CHECKING:
    from steploom.weave.lora.blend import Adapted

METHODS = ("forward", "encode", "decode")
HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
               "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_VARIANTS_KEPT = 2


class Target:
    """What a module call runs: a shared module in one variant, and one of its methods.

    Attributes:
        name: The component's name in the pipeline, such as ``"transformer"``.
        key: Equal for calls that may run together.
        group: The same without the adapters that keep calls apart: requests of one group share a tick.
        ragged: How its arguments are made alike, where they have rows or lengths of their own.
        language: The same, if it is a language model.
        patched: The application's module, where ``module`` is a clone of it; used if its ``forward`` was replaced.
        adapted: The adapters that ``module`` carries for one request, if it does.
    """

    __slots__ = ("_invoke", "adapted", "group", "key", "language", "method", "module", "name", "patched", "ragged")

    def __init__(
        self,
        name: str,
        method: str,
        module: Any,
        key: Hashable,
        *,
        group: Hashable = None,
        adapted: Adapted | None = None,
        language: LanguageRule | None = None,
    ) -> None:
        self.name = name
        self.method = method
        self.module = module
        self.key = key
        self.group = key if group is None else group
        self.adapted = adapted
        self.language = language
        self.ragged: Rule | LanguageRule | None = language or rule_for(getattr(module, "_orig_mod", module))
        self.patched: Any = None
        self._invoke: Callable[..., Any] = module if method == "forward" else getattr(module, method)

    def wrap(self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts something around the real module: what counts its compilations, or replays it as a CUDA graph."""
        self._invoke = around(self.name, self._invoke)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the real module.

        Raises:
            RuntimeError: It raised ``SystemExit`` or the like, which is to end its request, and not the engine.
        """
        try:
            if self.patched is not None and "forward" in self.patched.__dict__:
                return self.patched(*args, **kwargs)
            if self.adapted is not None:
                return self.adapted.invoke(self._invoke, args, kwargs)
            return self._invoke(*args, **kwargs)
        except BaseException as fault:
            if not exits.is_strangers(fault):
                raise
            raise RuntimeError(f"{self.method} of {self.name} raised {raised(fault)}") from fault


class SharedModule:
    """One top-level module of the user's pipeline, shared by all programs.

    Args:
        name: The component's name in the pipeline.
        given: As the pipeline holds it (perhaps a compiled wrapper).
        isolated: Whether the application may use the pipeline meanwhile, and set processors on its modules.
        language: How its calls are merged, if it is the denoiser of a language model.

    Attributes:
        base: What calls run: ``given``, or a clone of it that shares its parameters.
        origin: The module inside the wrapper; what copies are made from.
        remembers: What the application's code in it keeps from call to call, if it keeps something.
    """

    def __init__(self, name: str, given: Any, *, isolated: bool = False, language: LanguageRule | None = None) -> None:
        self.name = name
        self.language = language
        self.given = given
        source = getattr(given, "_orig_mod", given)
        self._source_module = source
        self._forwards = self._forwards_now()
        self.remembers = self._remembers_now()
        self._structure = ModuleStructure(source, tensors=isolated and clones(given))
        self._was = (
            self._structure.now() if isolated else None
        )  # before it is cloned: what changes meanwhile has changed
        as_it_is = self.remembers is not None and not self.remembers.own  # what is kept may be about this very one
        self.base: Any = isolate(given) if isolated and not as_it_is else given
        self.origin: nn.Module = getattr(self.base, "_orig_mod", self.base)
        self.dtype: torch.dtype | None = getattr(self.origin, "dtype", None)
        self.device: torch.device | None = getattr(self.origin, "device", None)
        self._hooks_seen, self._hooked = -1, False
        self._source: ModuleStructure | None = None
        self._converted: OrderedDict[Hashable, nn.Module] = OrderedDict()
        methods = [method for method in METHODS if callable(getattr(self.origin, method, None))]
        self.targets = {
            method: Target(name, method, self.base, (id(self.base), method, ()), language=language)
            for method in methods
        }
        if self.base is not given:
            self.targets["forward"].patched = given

    def own_tree(self, current: nn.Module) -> nn.Module:
        """A clone for one program, on which the application's code may keep what it has seen."""
        return own_processors(clone_tree(current, patched=True))

    @property
    def pliable(self) -> bool:
        """Whether it can be cloned, so that a program may change its own."""
        return self.base is not self.given or not self._structure.patched

    def changed(self, called: Callable[[], bool]) -> bool:
        """Whether the application has changed the module since this was made.

        Args:
            called: Whether a direct call may be running: what it has set for a while is no change.
        """
        now = self._structure.now()
        if self._was is None:
            return False
        forwards = self._forwards_now()
        if (now is not self._was or forwards != self._forwards) and self._remembers_now() != self.remembers:
            return True
        self._forwards = forwards
        if now is self._was:
            return False
        if now.unhooked == self._was.unhooked:
            self._was = now
            return False
        if now.steady != self._was.steady:
            return True
        # a direct call may have ended meanwhile, which takes back what it had set, or the next one may have begun
        return not called() and self._structure.now().unhooked != self._was.unhooked and not called()

    def _forwards_now(self) -> dict[type, Any]:
        """What its parts' classes run: clones are of the same classes, so it needs no others when one is replaced."""
        parts = self._source_module.modules() if is_denoiser(self.name) else ()
        return {cls: getattr(cls, "forward", None) for cls in set(map(type, parts))}

    def _remembers_now(self) -> Memory | None:
        return remembers(self._source_module) if is_denoiser(self.name) else None

    def hooked_by_pipeline(self) -> bool:
        """Whether a pipeline has registered a hook on one of its parts (JoyImage): it must see its own call only."""
        if self._hooks_seen != RemovableHandle.next_id or self._hooked:
            self._hooks_seen = RemovableHandle.next_id
            hooks = (hook for part in self.origin.modules() for hook in part.__dict__["_forward_hooks"].values())
            self._hooked = any(str(getattr(hook, "__module__", "")).startswith("diffusers.pipelines") for hook in hooks)
        return self._hooked

    @property
    def made_from(self) -> Token:
        """What a clone is made from that is made now: another one once the application has changed the module."""
        if self._source is None:
            self._source = ModuleStructure(self.origin, tensors=True)
        return self._source.now()

    def converted(self, dtype: torch.dtype | None, device: torch.device | None) -> nn.Module:
        """A clone in another dtype or on another device; kept, for the next program that wants the same."""
        key = (dtype, device, version(self.origin), self.made_from)
        if key not in self._converted:
            self._converted[key] = clone_tree(self.origin, own_parameters=True).to(device=device, dtype=dtype)
        self._converted.move_to_end(key)
        while len(self._converted) > _VARIANTS_KEPT:
            self._converted.popitem(last=False)
        return self._converted[key]

    def forget_conversions(self) -> None:
        """Drops the kept clones."""
        self._converted.clear()


def version(module: nn.Module) -> Hashable:
    """Changes when the weights are updated in place or replaced (an update through ``.data`` leaves no trace)."""
    return hash(tuple((id(p), 0 if p.is_inference() else p._version) for p in module.parameters()))


def isolate(given: Any) -> Any:
    """A clone that shares parameters and the tables of hooks; ``given`` itself if any of it is compiled or offloaded.

    A direct call of the application's pipeline may set attention processors on its modules while programs run, and a
    VAE of videos keeps what it has seen of the earlier frames on itself. transformers' models, which install hooks of
    their own at their first call, stay as they are.
    """
    return twin(given) if clones(given) else given


def clones(given: Any) -> bool:
    """Whether an isolated module is run as a clone."""
    if not isinstance(given, nn.Module) or is_compiled(given):
        return False
    return not _hooks_itself(given) and pliable(given)


def _hooks_itself(module: nn.Module) -> bool:
    """Whether it is one of transformers' models: these install hooks of their own at their first call."""
    return any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def pliable(module: nn.Module) -> bool:
    """Whether a module can be cloned: one with an object's own ``forward`` (an offloading hook, say) cannot."""
    return not any("forward" in part.__dict__ for part in module.modules())


def twin(module: nn.Module, *, unhooked: bool = False) -> nn.Module:
    """A structural clone that shares parameters, and the tables of hooks unless the model installs hooks itself."""
    clone = clone_tree(module, unhooked=unhooked)
    if _hooks_itself(module):  # would install them once for each clone
        return clone
    for own, theirs in zip(clone.modules(), module.modules(), strict=True):
        own.__dict__.update({table: theirs.__dict__[table] for table in HOOK_TABLES if table in theirs.__dict__})
    return clone


def clone_tree(
    module: nn.Module,
    *,
    own_parameters: bool = False,
    unhooked: bool = False,
    patched: bool = False,
    memo: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """A structural clone of a module tree: own submodule objects and tables, shared tensors.

    With ``own_parameters`` the parameter objects are new too (over the same storage), so that ``to`` leaves the
    original alone. A clone runs uncompiled: compiled code does not look at the hooks that a program sets. With
    ``unhooked`` a module with the hooks of group offloading is cloned too, without these; with ``patched`` one with a
    ``forward`` that the application has set on an object, which then means the clone.
    """
    if memo is None:
        memo = {}
        clone = clone_tree(module, own_parameters=own_parameters, unhooked=unhooked, patched=patched, memo=memo)
        settle_parts(memo)
        return clone
    if id(module) in memo:
        return memo[id(module)]
    left_out: tuple[str, ...] = ()
    if "forward" in module.__dict__ and not (patched and is_patched(module)):
        if not (unhooked and only_offloaded(module)):
            raise unclonable(module)
        left_out = LEFT_OUT
    clone = object.__new__(type(module))
    memo[id(module)] = clone
    for name, value in module.__dict__.items():
        if name not in left_out:
            clone.__dict__[name] = own_config(value) if name == "_internal_dict" else own_containers(value)
    if own_parameters:
        clone.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter(p.data, requires_grad=p.requires_grad)
            for name, p in module.__dict__["_parameters"].items()
        }
    clone.__dict__["_modules"] = {
        name: child
        if child is None
        else clone_tree(child, own_parameters=own_parameters, unhooked=unhooked, patched=patched, memo=memo)
        for name, child in module.__dict__["_modules"].items()
    }
    clone.__dict__["_compiled_call_impl"] = None
    return clone


def own_config(config: Any) -> Any:
    """A copy of a model's settings, which are frozen in name only: a control LoRA sets the channels that it brings."""
    own = type(config)(config)
    own.__dict__.update(config.__dict__)
    return own


def own_containers(value: Any, depth: int = DEEPEST) -> Any:
    """A copy of a list or dict, and of those in it; anything else as it is."""
    if type(value) not in CONTAINERS:
        return value
    if depth == 0 or not value:
        return value.copy()
    if type(value) is list:
        return [own_containers(item, depth - 1) for item in value]
    return type(value)((name, own_containers(item, depth - 1)) for name, item in value.items())


def own_processors(tree: nn.Module) -> nn.Module:
    """Gives a clone attention processors of its own, as far as they are the model library's: they have settings."""
    copies: dict[int, Any] = {}
    for module in tree.modules():
        processor = module.__dict__.get("processor")
        if processor is not None and library_settings(processor) is not None:
            if id(processor) not in copies:
                own = copies[id(processor)] = copy.copy(processor)
                own.__dict__.update({name: own_containers(value) for name, value in processor.__dict__.items()})
            module.__dict__["processor"] = copies[id(processor)]
    return tree
