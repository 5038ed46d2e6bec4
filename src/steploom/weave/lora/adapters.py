"""Adapters: LoRA files, loaded once by diffusers' own code into clones, and chosen by each request for itself.

The application's pipeline is never touched: a file is injected into a scratch copy of the pipeline, whose LoRA layers
are then grafted, by reference, onto the views of the requests that chose it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from steploom.errors import GenerationFailed, InvalidRequest
from steploom.weave import untyped
from steploom.weave.lora.blend import Adapted, Blend, Part, View, activate, graft
from steploom.weave.lora.common import borrowers, spread
from steploom.weave.modules import offloading
from steploom.weave.modules.compiled import is_compiled
from steploom.weave.modules.rebinding import Rebinding
from steploom.weave.modules.shared import SharedModule, clone_tree, twin
from steploom.weave.modules.structure import Token


@dataclasses.dataclass(eq=False)
class Adapter:
    """One LoRA, loaded.

    Attributes:
        number: Of its loading; never given again.
        parts: What it has for each module, by component.
        whole: Modules that it changes in another way than by LoRA layers (LoKr, control LoRAs): they serve it alone.
    """

    number: int
    parts: dict[str, Part]
    whole: dict[str, nn.Module] = dataclasses.field(default_factory=dict[str, nn.Module])


Chosen = Sequence[tuple[Adapter, float]]
"""Adapters and their scales, in the order in which ``set_adapters`` is given them."""


def load(pipeline: Any, shared: Mapping[str, SharedModule], where: tuple[str, str | None], number: int) -> Adapter:
    """Loads a LoRA as ``pipe.load_lora_weights`` does, into clones of the modules.

    Args:
        pipeline: What it is for; not touched.
        shared: Its modules by component.
        where: A file's folder, a folder or a hub id, and the file's name in it, if known.
        number: For the adapter.

    Raises:
        InvalidRequest: It cannot be read, or does not fit.
    """
    trees, flags = {}, [(p, p.requires_grad) for one in shared.values() for p in one.origin.parameters()]
    for component, one in shared.items():
        trees[component] = _scratch(one)
    before = {component: _fingerprint(tree) for component, tree in trees.items()}
    known = {id(tensor): tensor for tree in trees.values() for tensor in _tensors(tree)}
    name = f"steploom_{number}"
    try:
        untyped.load_lora(_bare_copy(pipeline, shared, trees), where[0], name, where[1])
    except Exception as fault:  # noqa: BLE001 - diffusers, PEFT, safetensors and the hub raise anything: told to the request
        raise InvalidRequest(f"cannot be loaded: {type(fault).__name__}: {fault}", field="lora") from None
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)  # PEFT freezes what it injects into
    parts = {component: part for component, tree in trees.items() if (part := part_of(tree, name)).layers}
    changed = {component for component in trees if _fingerprint(trees[component]) != before[component]}
    odd = {c for c, part in parts.items() if not all(map(untyped.lora_tables, part.layers.values()))}
    _take_out_of_file(trees.values(), known)
    if not parts and not changed:
        names = ", ".join(shared)
        raise InvalidRequest(f"has no weights for any of {type(pipeline).__name__}'s {names}", field="lora")
    _refuse_whole_in_common(shared, changed | odd)
    parts = spread(shared, parts)
    for component, part in parts.items():
        _refuse_by_leaves(shared[component], part, odd=component in odd)
        if component not in changed | odd:
            _let_go(part)
    return Adapter(number, parts, {component: trees[component] for component in changed | odd})


def _tensors(tree: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module tree."""
    return chain(tree.parameters(), tree.buffers())


def _take_out_of_file(trees: Iterable[nn.Module], known: Mapping[int, torch.Tensor]) -> None:
    """Gives loaded tensors memory of their own: safetensors' is the file's, in which anybody may write meanwhile."""
    for tensor in chain.from_iterable(map(_tensors, trees)):
        if id(tensor) not in known and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _refuse_whole_in_common(shared: Mapping[str, SharedModule], whole: Iterable[str]) -> None:
    """Refuses a changed clone of one component where another has modules of it, which would stay as they were."""
    for component in whole:
        for other in borrowers(shared, component):
            raise InvalidRequest(
                f"changes {component} in another way than by LoRA layers (LoKr, control LoRA), and {other} uses "
                f"modules of {component}, which would stay as they are; give a LoRA, or serve without {other}",
                field="lora",
            )


def _refuse_by_leaves(shared: SharedModule, part: Part, *, odd: bool) -> None:
    """Refuses what reads a layer's weights before that layer brings them to the device, as for diffusers alone."""
    embeds = any(getattr(layer, "lora_embedding_A", None) for layer in part.layers.values())
    if offloading.by_leaves(shared.origin) and (odd or embeds or not part.plain):
        raise InvalidRequest(
            f"is for {shared.name} a DoRA, a LoKr or the like, which reads weights outside of their layer's call, and "
            "with group_offload='leaf_level' they are on the device during that alone; serve with 'block_level'",
            field="lora",
        )


def _let_go(part: Part) -> None:
    """Forgets the layers that an adapter was loaded around: where they are offloaded, theirs become other tensors."""
    for layer in part.layers.values():
        layer._modules["base_layer"] = None


def part_of(tree: nn.Module, name: str) -> Part:
    """What the adapter called ``name`` has in a module tree."""
    layers = untyped.tuner_layers(tree)
    return Part({path: layer for path, layer in layers.items() if name in getattr(layer, "scaling", ())}, name)


def refusal(pipeline: Any) -> str | None:
    """Why requests of this pipeline cannot have adapters; None if they can."""
    if not untyped.takes_lora(pipeline):
        return f"{type(pipeline).__name__} has no load_lora_weights, so diffusers cannot load adapters into it"
    if not untyped.has_peft():
        return "LoRA needs the package peft; pip install 'steploom[lora]'"
    for component, module in untyped.modules_of(pipeline).items():
        why = _unclonable(getattr(module, "_orig_mod", module))
        if why is not None:
            return f"{component} {why}"
        if any(getattr(layer, "merged_adapters", None) for layer in untyped.tuner_layers(module).values()):
            # PEFT takes fused adapters out, in place, before it loads another: out of the application's own weights.
            return (
                f"{component} has adapters fused into it, which loading others would take out again; call "
                "pipe.unload_lora_weights() after pipe.fuse_lora(): the weights stay fused"
            )
    return None


def _unclonable(module: nn.Module) -> str | None:
    """Why adapters cannot be put on clones of a module; None if they can."""
    odd = [part for part in module.modules() if "forward" in part.__dict__ and not offloading.only_offloaded(part)]
    if odd:
        return (
            f"has a forward that was set on an object (its {type(odd[0]).__name__}), which a clone with adapters would "
            "not follow; define it in a subclass, and set the object's __class__, instead"
        )
    return offloading.unfit(module)


def own_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapters that the application has loaded itself."""
    layers = [layer for module in modules.values() for layer in untyped.tuner_layers(module).values()]
    return sorted({name for layer in layers for name in getattr(layer, "scaling", ())})


def _bare_copy(pipeline: Any, shared: Mapping[str, SharedModule], trees: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of the pipeline that holds ``trees``."""
    copy, by_id = object.__new__(type(pipeline)), {id(one.given): trees[name] for name, one in shared.items()}
    copy.__dict__.update({name: by_id.get(id(value), value) for name, value in pipeline.__dict__.items()})
    Rebinding({**by_id, id(pipeline): copy}).settle(copy, "pipe")
    return copy


def _scratch(shared: SharedModule) -> nn.Module:
    """A clone to load into: parameters of its own, and vectors in storage of their own (norms may be overwritten)."""
    why = _unclonable(shared.origin)
    if why is not None:
        raise InvalidRequest(f"{shared.name} {why}", field="lora")
    tree = clone_tree(shared.origin, unhooked=True)
    for part in tree.modules():
        own: dict[str, Any] = part.__dict__["_parameters"]
        for name, parameter in own.items():
            if type(parameter) is nn.Parameter:
                value = parameter.data.clone() if parameter.ndim < 2 else parameter.data
                own[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return tree


def _fingerprint(tree: nn.Module) -> Hashable:
    """Changes when anything but the injected layers does."""
    injected = tuple(f"{path}." for path in untyped.tuner_layers(tree))
    seen: dict[str, Hashable] = {}
    for path, part in tree.named_modules():
        if f"{path}." in injected or (path.startswith(injected) and ".base_layer" not in path):
            continue
        own = [(name, id(p), p._version) for name, p in part.named_parameters(recurse=False)]
        seen[path.replace(".base_layer", "")] = (type(part), tuple(own))
    return frozenset(seen.items())


class Weaver:
    """Makes the views of requests' choices, and the blends on which different choices run together.

    Args:
        shared: The modules by component.
    """

    def __init__(self, shared: Mapping[str, SharedModule]) -> None:
        self._shared = shared
        self._blends: dict[str, tuple[Token, Blend]] = {}

    @property
    def made_from(self) -> tuple[Token, ...]:
        """What views are made from that are made now."""
        return tuple(one.made_from for one in self._shared.values())

    def views(self, chosen: Chosen) -> dict[int, View]:
        """The modules with these adapters, by identity of the pipeline's own.

        Raises:
            InvalidRequest: They cannot be stacked.
            GenerationFailed: A module cannot be cloned.
        """
        found: dict[int, View] = {}
        for component, one in self._shared.items():
            touched = [(adapter, scale) for adapter, scale in chosen if component in {*adapter.parts, *adapter.whole}]
            if touched or untyped.tuner_layers(one.origin):  # the application's own are not active beside a choice
                found[id(one.given)] = self._view(component, one, touched)
        return found

    def reset(self) -> None:
        """Forgets the modules as they were; no view is in use."""
        self._blends.clear()

    def _view(self, component: str, shared: SharedModule, chosen: Chosen) -> View:
        key = tuple((adapter.number, scale) for adapter, scale in chosen)
        if any(component in adapter.whole for adapter, _ in chosen):
            module, signature = _whole(component, chosen), None
            offloading.follow(module, shared.origin)
            return View(shared, module, Adapted(module, key, _alias(chosen), signature, None))
        parts = [(adapter.parts[component], scale) for adapter, scale in chosen]
        blend = self._blend(component, shared, parts, _alias(chosen))
        module = twin(shared.origin, unhooked=True)
        aliases = [_alias([one]) for one in chosen]
        for (part, scale), alias in zip(parts, aliases, strict=True):
            graft(module, part, alias, scale)
        activate(module, aliases)
        offloading.follow(module, shared.origin)
        signature = parts[0][0].signature if parts else None
        return View(shared, module, Adapted(module, key, _alias(chosen), signature, blend))

    def _blend(
        self, component: str, shared: SharedModule, parts: Sequence[tuple[Part, float]], alias: str
    ) -> Blend | None:
        """Where calls with this choice run together with others; None for stacks, DoRA, and compiled modules."""
        if len(parts) != 1 or not parts[0][0].plain or shared.base is not shared.origin:
            return None
        if is_compiled(shared.origin) or untyped.tuner_layers(shared.origin):
            return None
        source, blend = self._blends.get(component, (None, None))
        if blend is None or source != shared.made_from:
            blend = Blend(shared.origin)
            self._blends[component] = (shared.made_from, blend)
        blend.add(parts[0][0], alias, parts[0][1])
        return blend


def _alias(chosen: Chosen) -> str:
    """A name for adapters at their scales, such as a module may have."""
    return "_and_".join(f"{adapter.number}_at_{scale!r}".replace(".", "_") for adapter, scale in chosen) or "none"


def _whole(component: str, chosen: Chosen) -> nn.Module:
    """A module that was changed by more than LoRA layers: for one adapter alone."""
    if len(chosen) != 1:
        raise InvalidRequest(
            f"{component} is changed by one of these adapters in another way than by LoRA layers (LoKr, control LoRA), "
            "so they cannot be stacked; give it alone",
            field="lora",
        )
    adapter, scale = chosen[0]
    try:
        module = clone_tree(adapter.whole[component])
    except GenerationFailed as fault:
        raise InvalidRequest(str(fault), field="lora") from None
    name = f"steploom_{adapter.number}"
    for layer in untyped.tuner_layers(module).values():
        layer._active_adapter = [name]
        layer.set_scale(name, scale)
    return module
