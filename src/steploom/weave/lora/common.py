"""Modules that components of one pipeline have in common: what is injected into them for one, the other has too.

Z-Image's ControlNet is given the embedders and refiners of its transformer. Diffusers injects LoRA layers into these in
place, so that the ControlNet runs with them; here each component is adapted in a clone of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from steploom.weave.lora.blend import Part
from steploom.weave.modules.shared import SharedModule


def spread(shared: Mapping[str, SharedModule], parts: Mapping[str, Part]) -> dict[str, Part]:
    """What an adapter has for each component, once what it has for modules in common counts for all that use them.

    A layer that itself is in common, but not the module that it is in, is replaced in one of them alone.

    Args:
        shared: All components.
        parts: By component, as the adapter was loaded for each by itself.
    """
    found = dict(parts)
    for component, part in parts.items():
        for place, other, theirs in _in_common(shared, component):
            inside = {f"{theirs}.{leaf}": layer for leaf, layer in _directly_in(place, part)}
            if inside:
                known = found[other].layers if other in found else {}
                found[other] = Part({**inside, **known}, part.name)
    return found


def borrowers(shared: Mapping[str, SharedModule], component: str) -> list[str]:
    """Other components that have modules of ``component``."""
    return sorted({other for _, other, _ in _in_common(shared, component)})


def _in_common(shared: Mapping[str, SharedModule], component: str) -> Iterator[tuple[str, str, str]]:
    """Modules of ``component`` with parameters that others have: where, which others, and where in these."""
    own = {
        id(part): path
        for path, part in _tree(shared[component]).named_modules()
        if next(part.parameters(), None) is not None
    }
    for other, one in shared.items():
        for path, part in _tree(one).named_modules() if other != component else ():
            if id(part) in own:
                yield own[id(part)], other, path


def _directly_in(place: str, part: Part) -> Iterator[tuple[str, Any]]:
    """The layers of an adapter in one module, not in those within it, and their names there."""
    for path, layer in part.layers.items():
        home, _, leaf = path.rpartition(".")
        if home == place:
            yield leaf, layer


def _tree(one: SharedModule) -> nn.Module:
    """As the pipeline holds it: clones have no modules in common."""
    return getattr(one.given, "_orig_mod", one.given)
