"""A program's own pipeline: a shallow copy whose modules are woven and whose noise schedulers are its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from steploom.weave import untyped
from steploom.weave.copies import is_woven, weave_inside, woven_module
from steploom.weave.kinds import is_module
from steploom.weave.modules.direct_calls import called_elsewhere
from steploom.weave.modules.keeping import keeps
from steploom.weave.modules.locks import lock_of
from steploom.weave.modules.merged import refuse_modules
from steploom.weave.modules.rebinding import Rebinding, unsettled
from steploom.weave.modules.shared import SharedModule
from steploom.weave.modules.tokenizers import Tokenizers
from steploom.weave.noise.choice import replacement
from steploom.weave.own_class import woven_class
from steploom.weave.ragged.rules import language_rules
from steploom.weave.text import watch_for
from steploom.weave.watching import Watcher

if TYPE_CHECKING:
    from steploom.weave.lora.blend import View

log = logging.getLogger(__name__)

_NO_VIEWS: Mapping[int, View] = MappingProxyType({})


class Loom:
    """The shared modules of one pipeline, from which programs' own pipelines are made.

    Args:
        pipeline: The user's pipeline; never modified.
        isolated: Whether the application may call it meanwhile.

    Attributes:
        one_by_one: Why no program may begin before the one before it is over; None if they may run together.

    Raises:
        ConfigError: A function was set on it, or on a part of it, that programs cannot have.
    """

    def __init__(self, pipeline: Any, *, isolated: bool = False) -> None:
        self.pipeline = pipeline
        modules = untyped.modules_of(pipeline)
        rules = language_rules(pipeline)
        self.shared = {
            name: SharedModule(name, module, isolated=isolated, language=rules.get(name))
            for name, module in modules.items()
        }
        self.one_by_one = self._why_one_by_one()
        if self.one_by_one is not None:
            log.warning("requests run one after another, each alone: %s", self.one_by_one)
        self._by_id = {id(shared.given): shared for shared in self.shared.values()}
        self._inner = self._find_inner()
        self._isolated = isolated
        self._adopted: dict[str, nn.Module] = {}
        self._tokenizers = Tokenizers()
        self.device: Any = pipeline._execution_device
        self._refuse_functions()

    def _find_inner(self) -> dict[str, tuple[str, SharedModule]]:
        """By component, what is woven inside of it, and its path there."""
        watch = watch_for(self.pipeline)
        if watch is None or watch.inner is None or watch.inner[0] not in self.shared:
            return {}
        component, path = watch.inner
        try:
            found = self.shared[component].origin.get_submodule(path)
        except AttributeError:  # another model of the same interface: its text is told when it is done
            return {}
        return {component: (path, SharedModule(f"{component}.{path}", found))}

    def _why_one_by_one(self) -> str | None:
        for name, shared in self.shared.items():
            if shared.remembers is not None and not shared.remembers.own:
                return f"{name}: {shared.remembers.why}"
        lock, kept = lock_of(self.pipeline), keeps(self.pipeline, getattr(self.pipeline, "scheduler", None))
        if lock is not None:
            return f"{type(self.pipeline).__name__} takes the lock {lock!r}"
        return None if kept is None else f"{type(self.pipeline).__name__}: {kept.why}"

    @property
    def outdated(self) -> bool:
        """Whether the application has changed its modules since (:mod:`steploom.weave.modules.structure`)."""
        if not self._isolated:
            return False
        modules = {**untyped.modules_of(self.pipeline), **self._adopted}
        if modules.keys() != self.shared.keys():
            return True
        known = [(self.shared[name], module) for name, module in modules.items()]
        return any(shared.given is not module or shared.changed(self._called) for shared, module in known)

    def _called(self) -> bool:
        return called_elsewhere([shared.given for shared in self.shared.values()])

    def adopt(self, modules: Mapping[str, nn.Module]) -> None:
        """Shares further modules, which pipelines of the family have besides those of the user's pipeline."""
        for name, module in modules.items():
            if id(module) not in self._by_id:
                shared = self.shared[name] = SharedModule(name, module, isolated=self._isolated)
                self._by_id[id(module)] = shared
                self._adopted[name] = module

    def thread_pipeline(
        self,
        watcher: Watcher,
        noise_scheduler: str | Mapping[str, Any] | None = None,
        views: Mapping[int, View] = _NO_VIEWS,
        pipeline: Any = None,
    ) -> Any:
        """A pipeline for one program, which tells ``watcher`` what it does.

        Args:
            watcher: Hears of steps and totals.
            noise_scheduler: The request's own noise scheduler, if it has one.
            views: The modules with the request's adapters, by identity of the pipeline's module.
            pipeline: Another pipeline over the same modules; None is the user's own.

        Raises:
            InvalidRequest: ``noise_scheduler`` names no class of diffusers that goes with the pipeline's own.
            ConfigError: A function was set on the pipeline or a part of it that cannot be had for a copy.
        """
        pipeline = self.pipeline if pipeline is None else pipeline
        if noise_scheduler is not None and getattr(pipeline, "scheduler", None) is None:
            replacement(None, noise_scheduler)  # raises
        memo: dict[int, Any] = {}
        own = self._copy(pipeline, watcher, noise_scheduler, memo, "denoise", views)
        if pipeline is not self.pipeline:  # functions on the noise scheduler mean what they were set on
            members = vars(pipeline)
            given = [(value, members.get(name)) for name, value in vars(self.pipeline).items() if value is not None]
            theirs = {id(value): memo[id(member)] for value, member in given if id(member) in memo}
            memo = {**theirs, id(self.pipeline): own, **memo}
        _settle(own, memo)
        return own

    def _refuse_functions(self) -> None:
        """Makes a copy for nobody: that raises what is wrong."""
        refuse_modules(self.pipeline, {name: shared.given for name, shared in self.shared.items()})
        watcher = Watcher()
        try:
            self.thread_pipeline(watcher)
        finally:
            watcher.close()

    def _copy(
        self,
        pipeline: Any,
        watcher: Watcher,
        override: Any,
        memo: dict[int, Any],
        stage: str,
        views: Mapping[int, View],
    ) -> Any:
        own = object.__new__(woven_class(type(pipeline)))
        memo[id(pipeline)] = own
        own.__dict__.update(pipeline.__dict__, _steploom=(watcher, stage, self.device))
        own.__dict__["_progress_bar_config"] = {"disable": True}  # for a pipeline that makes its bars itself (LLaDA 2)
        if getattr(pipeline, "scheduler", None) is not None and id(pipeline.scheduler) not in memo:
            source = pipeline.scheduler if override is None else replacement(pipeline.scheduler, override, pipeline)
            memo[id(pipeline.scheduler)] = watcher.observe(source, stage)
        for name, value in pipeline.__dict__.items():  # the combined pipelines of cascades hold all of their stages'
            if name.endswith("_scheduler") and id(value) not in memo and untyped.is_noise_scheduler(value):
                memo[id(value)] = watcher.observe(value, name.removesuffix("_scheduler"))
        for name, value in pipeline.__dict__.items():
            if id(value) in memo:
                own.__dict__[name] = memo[id(value)]
            elif is_module(value) or untyped.is_noise_scheduler(value) or untyped.is_guider(value):
                own.__dict__[name] = memo[id(value)] = self._own(value, views)
            elif self._isolated and untyped.is_tokenizer(value):
                own.__dict__[name] = memo[id(value)] = self._tokenizers.own(value)
            elif untyped.is_pipeline(value):
                own.__dict__[name] = self._copy(value, watcher, None, memo, name, views)
        return own

    def forget_conversions(self) -> None:
        """Drops the modules' variants in other dtypes."""
        for shared in self.shared.values():
            shared.forget_conversions()

    def _own(self, value: Any, views: Mapping[int, View]) -> Any:
        shared = self._by_id.get(id(value))
        if shared is None:
            return unsettled(value)
        woven = woven_module(shared, views.get(id(value)))
        if shared.name in self._inner:
            weave_inside(woven, *self._inner[shared.name])
        return woven


def detached(pipeline: Any) -> Any:
    """A copy of a program's own pipeline: what is called on it leaves no trace on that program."""
    own = object.__new__(type(pipeline))
    own.__dict__.update(pipeline.__dict__, _steploom=(Watcher(), *pipeline._steploom[1:]))
    memo: dict[int, Any] = {id(pipeline): own}
    for name, value in pipeline.__dict__.items():
        if is_woven(value):
            own.__dict__[name] = memo[id(value)] = woven_module(value._steploom.shared)
        elif untyped.is_noise_scheduler(value):
            own.__dict__[name] = memo[id(value)] = copy.copy(value)  # nobody observes the copy
    _settle(own, memo)
    return own


def _settle(own: Any, memo: Mapping[int, Any]) -> None:
    """Has the functions that were set on the originals mean the copies, of which ``own`` is the outermost."""
    copies = {**memo, **{id(one._steploom.home): one for one in memo.values() if is_woven(one)}}
    rebinding = Rebinding(copies)
    names = {id(own): "pipe"}
    for pipeline in filter(untyped.is_pipeline, memo.values()):
        called = names.get(id(pipeline), type(pipeline).__name__)
        for name, value in vars(pipeline).items():
            names.setdefault(id(value), f"{called}.{name}")
    for one in {id(one): one for one in copies.values()}.values():
        rebinding.settle(one, names.get(id(one), type(one).__name__))
