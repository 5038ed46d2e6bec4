"""Which class a component is of: what an index or its own configuration says; perhaps code that it brings along."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from steploom.errors import ConfigError, raised
from steploom.weave import untyped


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a component is.

    Attributes:
        name: A folder, or a hub id.
        inner: The folder of the component in it; "" if it is the component's own.
        setting: Which setting named it, and its value, for messages.
        hub: How the hub is asked.
        trusted: Whether code that is there may run here.
    """

    name: str
    inner: str
    setting: str
    hub: Mapping[str, Any]
    trusted: bool

    @property
    def folder(self) -> Path | None:
        """The component's folder; None if it is on the hub."""
        return Path(self.name, self.inner) if Path(self.name).is_dir() else None

    @property
    def where(self) -> dict[str, Any]:
        """What finds it, as keywords of diffusers' methods beside the first argument, which is :attr:`source`."""
        return dict(self.hub) if self.folder is not None or not self.inner else {**self.hub, "subfolder": self.inner}

    @property
    def source(self) -> str:
        """The first argument."""
        return self.name if self.folder is None else str(self.folder)


def brings_code(place: Place, library: str) -> bool:
    """Whether an index means by ``library`` a file of Python beside the component."""
    utilities = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
    if library in utilities.LOADABLE_CLASSES or hasattr(importlib.import_module("diffusers.pipelines"), library):
        return False
    return place.folder is None or (place.folder / f"{library}.py").is_file()


def of_index(place: Place, library: str, name: str) -> Any:
    """The class that an index says.

    Raises:
        ConfigError: It is code that is not trusted, or cannot be imported.
    """
    return _code(place, library, name) if brings_code(place, library) else untyped.component_class(library, name)


def of_own(place: Place, listed: Any) -> Any:
    """The class that a component's own configuration says, which may be another than the pipeline's (a tiny VAE).

    Args:
        place: The component.
        listed: The pipeline's; of what has no configuration, or none that names a class.

    Raises:
        ConfigError: There is no such class, or it is code that is not trusted or cannot be imported.
    """
    config = _config(listed, place)
    mapped = (config.get("auto_map") or {}).get("AutoModel")  # how a configuration names code, for diffusers' AutoModel
    if isinstance(mapped, str) and "." in mapped:
        return _code(place, *mapped.rsplit(".", 1))
    name = config.get("_class_name")
    if name is None or untyped.has(name):
        return listed if name is None else untyped.component_class("diffusers", name)
    file = _defining(place.folder, name)
    if file is None:
        raise ConfigError(
            f"{place.setting}: its configuration names {name}, which neither diffusers {metadata.version('diffusers')} "
            "nor a file beside it has; upgrade diffusers, or put the class' file there and name both in its "
            f'config.json: "auto_map": {{"AutoModel": "FILE.{name}"}}'
        )
    return _code(place, file, name)


def library_of(cls: Any) -> str | None:
    """Whose way of loading, and so of quantizing, a class of components has: diffusers', transformers' or neither's."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in cls.__mro__}
    kinds = {"diffusers.ModelMixin": "diffusers", "transformers.PreTrainedModel": "transformers"}
    return next((library for base, library in kinds.items() if base in bases), None)


def _config(listed: Any, place: Place) -> dict[str, Any]:
    """The configuration of a component; nothing where it has none. On the hub, the class knows the file's name."""
    if place.folder is not None:
        files = [place.folder / name for name in ("config.json", "scheduler_config.json")]
        return next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    loader = listed if hasattr(listed, "load_config") else importlib.import_module("diffusers").AutoModel
    try:
        return dict(loader.load_config(place.source, **place.where))
    except OSError:
        return {}


def _code(place: Place, file: str, name: str) -> Any:
    """A class of a file that comes along with a component."""
    if not place.trusted:
        raise ConfigError(
            f"trust_remote_code=False: {place.setting} brings Python code along ({file}.py), which would run here; "
            "read it, and set trust_remote_code=True if you trust it"
        )
    try:
        load = importlib.import_module("diffusers.utils.dynamic_modules_utils").get_class_from_dynamic_module
        return load(place.source, f"{file}.py", class_name=name, trust_remote_code=True, **place.where)
    except (OSError, ConfigError):  # of the hub, or not there
        raise
    except Exception as error:
        raise ConfigError(f"{place.setting}: {name} of its {file}.py cannot be imported: {raised(error)}") from error


def _defining(folder: Path | None, name: str) -> str | None:
    """The file of a folder that defines a class."""
    definition = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    files = [] if folder is None else sorted(folder.glob("*.py"))
    return next((file.stem for file in files if definition.search(file.read_text(errors="replace"))), None)
