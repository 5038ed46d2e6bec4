"""Group offloading of clones: hooks of their own bring the weights, which they share with the original, to the device.

The hooks of diffusers' group offloading hold the modules that they were put on, so a clone cannot run with them. It is
made without, and gets its own once its layers are complete, with the settings of the original's. Modules run one after
another, and each takes its weights off the device again, so whichever runs finds them where it expects them.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

LEFT_OUT = ("forward", "_diffusers_hook")
"""Where hooks are, on each part of a module."""

_HOOKS = frozenset(("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"))


def is_offloaded(part: nn.Module) -> bool:
    """Whether a hook on this part of a module brings weights to the device and takes them off."""
    return "group_offloading" in getattr(part.__dict__.get("_diffusers_hook"), "hooks", {})


def only_offloaded(part: nn.Module) -> bool:
    """Whether a part's ``forward`` is its class', with nothing but the hooks of group offloading around it."""
    registry: Any = part.__dict__.get("_diffusers_hook")
    if registry is None or not registry.hooks.keys() <= _HOOKS:
        return False
    # A registry whose hooks were all taken off leaves the class' own method behind, bound to the part.
    forward: Any = registry._fn_refs[0].forward if registry._fn_refs else part.__dict__["forward"]
    return getattr(forward, "__func__", None) is type(part).forward and forward.__self__ is part


def unfit(module: nn.Module) -> str | None:
    """Why clones of a module cannot be offloaded as it is; None if they can, or it is not offloaded."""
    settings = _settings(module)
    if settings is not None and not _covered(module):
        return "is offloaded in part, and diffusers offloads modules as a whole; call pipe.enable_group_offload(...)"
    if settings is not None and settings.offload_to_disk_path is not None:
        return (
            "is offloaded to the disk, where diffusers writes its weights once, before there are adapters; leave "
            "offload_to_disk_path out, so that they wait in host memory"
        )
    return None


def by_leaves(module: nn.Module) -> bool:
    """Whether a module's weights are on the device during the calls of single layers alone."""
    settings = _settings(module)
    return settings is not None and settings.offload_type == "leaf_level"


def follow(clone: nn.Module, original: nn.Module) -> None:
    """Offloads a clone as its original is, if it is; again whenever layers were added to it or taken out.

    Args:
        clone: Ours alone.
        original: What it is a clone of; :func:`unfit` has nothing against it.
    """
    settings = _settings(original)
    if settings is None:
        return
    for part in clone.modules():
        for name in LEFT_OUT:
            part.__dict__.pop(name, None)
    importlib.import_module("diffusers.hooks.group_offloading")._apply_group_offloading(clone, settings)


def _settings(module: nn.Module) -> Any:
    """The settings of a module's hooks: the first one's, as for diffusers where it puts them on again."""
    first = next(filter(is_offloaded, module.modules()), None)
    return None if first is None else first.__dict__["_diffusers_hook"].hooks["group_offloading"].config


def _covered(part: nn.Module) -> bool:
    """Whether all weights of a module are under hooks."""
    if is_offloaded(part):
        return True
    own = [*part.__dict__["_parameters"].values(), *part.__dict__["_buffers"].values()]
    return all(one is None for one in own) and all(map(_covered, part.children()))
