"""Blends: one forward whose rows have different LoRA adapters.

A request with adapters sees *views* of the modules: structural clones that share the parameters and carry the request's
adapters, active at its scales. A call of views that are alike merges as any other and runs on the view. Calls with
different adapters, or with and without, run on the *blend*: a clone that carries the adapters of all of them, one name
per adapter and scale, where PEFT's mixed batches apply to each row the adapter that it is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from steploom.weave import untyped
from steploom.weave.modules import offloading
from steploom.weave.modules.shared import SharedModule, Target, clone_tree, twin

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


class RowsUnknown(Exception):
    """A layer's input cannot be told apart by rows, so that no row can have an adapter of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What one adapter has for one module.

    Attributes:
        layers: Its LoRA layers by path in the module tree.
        name: Its name in them.
    """

    layers: Mapping[str, Any]
    name: str

    @property
    def plain(self) -> bool:
        """Whether PEFT can mix it with others in a batch: no DoRA nor another variant."""
        return not any(
            self.name in layer.lora_variant or layer.use_dora.get(self.name) for layer in self.layers.values()
        )

    @property
    def signature(self) -> Hashable:
        """Equal for adapters of the same layers: where rows are found for one, they are for the other."""
        return hash(tuple(sorted((path, type(layer).__name__) for path, layer in self.layers.items())))


def graft(tree: nn.Module, part: Part, alias: str, scale: float) -> None:
    """Adds an adapter to a module tree as ``alias``: its weights by reference, its scale as ``set_adapters`` does.

    Its layers are copies over the same weights: where a tree is offloaded, it puts hooks on its own.
    """
    for path, source in part.layers.items():
        parent_path, _, leaf = path.rpartition(".")
        parent: Any = tree.get_submodule(parent_path)
        layer = parent._modules[leaf]
        if not untyped.lora_tables(layer):
            layer = parent._modules[leaf] = _shell(source, layer)
        for table in untyped.lora_tables(source):
            theirs = getattr(source, table)
            if part.name in theirs:
                one = theirs[part.name]
                getattr(layer, table)[alias] = clone_tree(one, unhooked=True) if isinstance(one, nn.Module) else one
        layer.set_scale(alias, scale)


def _shell(source: Any, base: nn.Module) -> Any:
    """A layer like ``source`` around ``base``, without adapters."""
    shell: Any = clone_tree(source, unhooked=True)
    for table in untyped.lora_tables(source):
        empty = type(getattr(source, table))()
        if table in shell._modules:
            shell._modules[table] = empty
        else:
            shell.__dict__[table] = empty
    shell._modules["base_layer"] = base
    shell.__dict__.update(_active_adapter=[], merged_adapters=[])
    return shell


def activate(tree: nn.Module, names: Iterable[str]) -> None:
    """Makes these adapters the active ones, and no others."""
    for layer in untyped.tuner_layers(tree).values():
        layer._active_adapter = list(names)


class Adapted:
    """The adapters that a view carries.

    Attributes:
        key: Equal for equal adapters at equal scales, for ever.
        alias: Their name in ``blend``.
        blend: Where calls run together with others; None if they cannot.
        signature: Which layers have adapters.
    """

    def __init__(self, module: nn.Module, key: Hashable, alias: str, signature: Hashable, blend: Blend | None) -> None:
        self.key = key
        self.alias = alias
        self.blend = blend
        self.signature = signature
        self._scalings = _scalings(module)

    def invoke(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs the view; the scale of an ``attention_kwargs={"scale": ...}`` leaves no trace on it."""
        with _restored(self._scalings if _has_scale(kwargs) else ()):
            return run(*args, **kwargs)


class View:
    """A shared module with one request's adapters.

    Args:
        shared: The module.
        module: A clone of it with the adapters, active.
        adapted: What it carries.

    Attributes:
        key: Equal for views that compute the same.
        targets: What calls run, by method.
    """

    def __init__(self, shared: SharedModule, module: nn.Module, adapted: Adapted) -> None:
        self.module = module
        self.key = adapted.key
        apart = () if adapted.blend is not None else (adapted.key,)
        self.targets: dict[str, Target] = {}
        for method in shared.targets:
            group = shared.targets[method].key
            self.targets[method] = Target(
                shared.name, method, module, (group, *apart) if apart else group, group=group, adapted=adapted
            )
        self._adapted = adapted

    def close(self) -> None:
        """The view is not used any more."""
        if self._adapted.blend is not None:
            self._adapted.blend.remove(self._adapted.alias)


class Blend:
    """A clone of a shared module that carries several adapters, each of which applies to the rows that it is told.

    Args:
        origin: The module, which has no adapters of its own.
    """

    def __init__(self, origin: nn.Module) -> None:
        self._origin = origin
        self._tree = twin(origin, unhooked=True)
        self._layers: dict[str, Any] = {}
        self._uses: Counter[str] = Counter()
        self._rows: Sequence[str] | None = None

    def add(self, part: Part, alias: str, scale: float) -> None:
        """Takes in an adapter as ``alias``, for one more view."""
        self._uses[alias] += 1
        if self._uses[alias] > 1:
            return
        graft(self._tree, part, alias, scale)
        for path in part.layers.keys() - self._layers.keys():
            layer: Any = self._tree.get_submodule(path)
            layer.register_forward_pre_hook(self._tell_rows, with_kwargs=True)
            self._layers[path] = layer
        offloading.follow(self._tree, self._origin)

    def remove(self, alias: str) -> None:
        """One view less needs an adapter; the last lets go of it."""
        self._uses[alias] -= 1
        if self._uses[alias]:
            return
        del self._uses[alias]
        for layer in self._layers.values():
            for table in untyped.lora_tables(layer):
                entries = getattr(layer, table)
                if alias in entries:
                    del entries[alias]
        offloading.follow(self._tree, self._origin)

    def invoke(self, method: str, rows: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module with the adapter named by ``rows`` for each row (:data:`BASE` for none).

        Raises:
            RowsUnknown: A layer does not see all rows.
        """
        run: Callable[..., Any] = self._tree if method == "forward" else getattr(self._tree, method)
        scaled = _has_scale(kwargs)
        if scaled:
            activate(self._tree, dict.fromkeys(rows))  # scaling is of what is active
        self._rows = rows
        try:
            with _restored(_scalings(self._tree) if scaled else ()):
                return run(*args, **kwargs)
        finally:
            self._rows = None

    def _tell_rows(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pre-forward hook on each LoRA layer, as PEFT's own: it is told the adapter of each entry of its input."""
        rows = self._rows
        if rows is None:
            return None
        each, rest = divmod(len(args[0]) if args else 0, len(rows))
        if rest or not each:
            raise RowsUnknown(f"a {type(layer).__name__} layer is not called with {len(rows)} rows")
        return args, {**kwargs, "adapter_names": [name for name in rows for _ in range(each)]}


def _has_scale(kwargs: Mapping[str, Any]) -> bool:
    """Whether diffusers will scale the active adapters during this call, and afterwards approximately back."""
    return any(isinstance(value, dict) and "scale" in value for value in kwargs.values())


def _scalings(module: nn.Module) -> list[tuple[dict[str, float], dict[str, float]]]:
    tables = [layer.scaling for layer in untyped.tuner_layers(module).values() if hasattr(layer, "scaling")]
    return [(table, dict(table)) for table in tables]


@contextlib.contextmanager
def _restored(scalings: Iterable[tuple[dict[str, float], dict[str, float]]]) -> Generator[None]:
    try:
        yield
    finally:
        for table, values in scalings:
            table.update(values)
