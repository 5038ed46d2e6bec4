"""A pipeline from its parts: a folder or hub id, single files, components of other models, or a factory's."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.order import is_denoiser
from steploom.worker import indexes, left_out, roles, sources
from steploom.worker.quantization import Quantization
from steploom.worker.sources import Source

_WHOLE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")
"""How the names of tensors begin that a file holds only if it holds more than a denoiser."""

_MODULAR = "diffusers.modular_pipelines."
"""Where diffusers has its modular pipelines and their blocks."""


def assemble(config: EngineConfig, source: Source, dtype: Any, progress: Callable[[str], None]) -> Any:
    """The pipeline that ``config`` describes, in host memory (quantized weights may be on a device already).

    Args:
        config: The engine's settings.
        source: What ``config.model`` names.
        dtype: A dtype of torch's, or one by component.
        progress: Is told what is being done.

    Raises:
        ConfigError: The parts do not go together.
    """
    if source.kind == "factory":
        return _made(config, source, dtype)
    parts = dict(config.components or {})
    if source.kind == "file":
        base, whole = _base_of(config, source, progress)
        assembly = _Assembly(config, base, dtype, parts)
        if whole:
            return assembly.from_whole_file(source)
        denoiser = assembly.denoiser_name()
        if denoiser in parts:
            raise ConfigError(f"components[{denoiser!r}]={parts[denoiser]!r}: model={config.model!r} is that one")
        parts[denoiser] = source.name
        return assembly.from_base()
    return _Assembly(config, source, dtype, parts).from_base()


def _made(config: EngineConfig, source: Source, dtype: Any) -> Any:
    """What the factory gives. A script's folder and the current one are where its module is looked for, too."""
    module, _, path = source.name.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"model={config.model!r}: there is no module {error.name!r} to import in the worker; run where it is, "
            "install it, or put its folder into PYTHONPATH"
        ) from None
    for part in path.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ConfigError(f"model={config.model!r}: {module} has no function {path!r}")
    positional, named = _arguments(factory, config)
    made: Any = factory(*positional, **named)
    if not untyped.is_pipeline(made):
        raise ConfigError(f"model={config.model!r}: gave {no_pipeline(made)}; return a DiffusionPipeline")
    if config.dtype != "auto":
        made = made.to(dtype)
    return untyped.for_task(made, config.task)


def no_pipeline(value: Any) -> str:
    """What ``value`` is, which is no diffusers pipeline: for messages."""
    cls: type = value if isinstance(value, type) else type(value)
    name = f"{'the class ' if cls is value else ''}{cls.__module__}.{cls.__qualname__}"
    if any(f"{base.__module__}.".startswith(_MODULAR) for base in cls.__mro__):
        return f"{name}, which belongs to a modular pipeline, and those are not served"
    return f"{name}, which is no diffusers pipeline"


def _arguments(factory: Any, config: EngineConfig) -> tuple[list[Any], dict[str, Any]]:
    """What a factory is called with: the engine's settings, for the one argument that it asks for, or nothing.

    Raises:
        ConfigError: It asks for more.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return [], {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes = [parameter for parameter in parameters if parameter.kind not in variadic]
    wanted = [parameter for parameter in takes if parameter.default is parameter.empty]
    if len(wanted) > 1:
        names = " and ".join(parameter.name for parameter in wanted)
        raise ConfigError(f"model={config.model!r}: asks for {names}; a factory takes nothing, or the EngineConfig")
    wanted = wanted or [parameter for parameter in takes if _is_for_config(parameter)]
    for parameter in wanted:
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            return [], {parameter.name: config}
        if parameter is takes[0]:
            return [config], {}
    return [], {}


def _is_for_config(parameter: inspect.Parameter) -> bool:
    """Whether a parameter with a default is meant for the engine's settings, by its annotation, or else its name."""
    kind: Any = parameter.annotation
    if kind is parameter.empty:
        return parameter.name == "config" and isinstance(parameter.default, EngineConfig | None)
    return EngineConfig.__name__ in re.findall(r"\w+", kind.__name__ if isinstance(kind, type) else str(kind))


def _base_of(config: EngineConfig, source: Source, progress: Callable[[str], None]) -> tuple[Source, bool]:
    """Where the rest of a single file's model comes from, and whether the file holds a whole pipeline's weights."""
    options = {"local_files_only": config.local_files_only, "revision": config.revision}
    tensors = untyped.checkpoint(source.name, **(options if source.name.startswith("http") else {}))
    whole = not source.gguf and any(name.startswith(_WHOLE) for name in tensors)
    if config.base_model is not None:
        base = sources.find(config.base_model, "base_model")
        if base.kind not in ("folder", "hub"):
            raise ConfigError(f"base_model={config.base_model!r}: is a {base.kind}; give a folder or a hub id")
        sources.refuse(dataclasses.replace(config, model=config.base_model, base_model=None, revision=None), base)
        return base, whole
    beside = Path(source.name).parent
    if (beside / sources.INDEX).is_file():
        return Source("folder", str(beside)), whole
    published = untyped.published_with(tensors)
    if published is None:
        raise ConfigError(
            f"base_model=None: it is not known which model {config.model!r} belongs to; give the folder or hub id, in "
            "diffusers layout, of a model of the same kind, for the configuration and all that the file does not hold"
        )
    progress(f"base_model is not given: what {config.model} does not hold comes from {published}")
    return Source("hub", published), whole


class _Assembly:
    """A folder or hub id, and what replaces some of its components."""

    def __init__(self, config: EngineConfig, base: Source, dtype: Any, parts: dict[str, str | None]) -> None:
        if base.kind == "folder":
            setting = "model" if config.base_model is None else "base_model"
            indexes.check(Path(base.name), f"{setting}={getattr(config, setting)!r}")
        self.config = config
        self.base = base
        self._dtype = dtype
        self._parts = parts
        self._hub = {"local_files_only": config.local_files_only}
        # A revision is one of the model; of another repository than that it means nothing.
        self._own = {**self._hub, **({"revision": config.revision} if config.base_model is None else {})}
        self._listed: dict[str, Any] | None = None

    def from_base(self) -> Any:
        """The base's pipeline, with replaced components."""
        config = self.config
        if isinstance(config.dtype, Mapping):
            for name in config.dtype:
                self._refuse_unknown(name, f"dtype[{name!r}]={config.dtype[name]!r}", "default")
        plain = config.quantization_config is None and not self._parts
        quantization = {} if plain else self._quantization()
        options: dict[str, Any] = {"dtype": self._dtype, "trust_remote_code": config.trust_remote_code, **self._own}
        if config.variant is not None:
            options["variant"] = config.variant
        replaced = {name: self._component(name, where, quantization) for name, where in self._parts.items()}
        remaining = {name: how for name, how in quantization.items() if name not in replaced}
        if remaining:
            options["quantization_config"] = untyped.pipeline_quantization(remaining)
        return untyped.load_pipeline(self.base.name, config.task, **options, **replaced)

    def from_whole_file(self, source: Source) -> Any:
        """A pipeline whose weights are in one file; the base gives its configuration."""
        if self.config.quantization_config is not None:
            raise ConfigError(
                f"quantization_config={self.config.quantization_config!r}: model={self.config.model!r} is a whole "
                "pipeline in one file, which diffusers does not quantize; save it with save_pretrained and give that "
                "folder, or leave quantization_config out"
            )
        name = str(self._index.get("_class_name"))
        cls = untyped.pipeline_class(name)
        if not hasattr(cls, "from_single_file"):
            raise ConfigError(f"model={self.config.model!r}: diffusers' {name} does not load from a single file")
        replaced = {name: self._component(name, where, {}) for name, where in self._parts.items()}
        loaded = cls.from_single_file(source.name, config=self.base.name, dtype=self._dtype, **self._hub, **replaced)
        return untyped.for_task(loaded, self.config.task)

    def denoiser_name(self) -> str:
        """The component that a file holds which holds one only."""
        for name in ("transformer", "unet", "prior", "decoder"):
            if self._listing(name) is not None:
                return name
        raise ConfigError(
            f"base_model={self.base.name!r}: has neither a transformer nor a unet for model={self.config.model!r}; "
            "give the base as model=, and the file in components="
        )

    @property
    def _index(self) -> dict[str, Any]:
        if self._listed is None:
            self._listed = untyped.model_index(self.base.name, **self._own)
        return self._listed

    def _listing(self, name: str) -> tuple[str, str] | None:
        """Library and class of a component."""
        entry = self._index.get(name)
        return (entry[0], entry[1]) if isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[0] else None

    def _class(self, name: str) -> Any:
        self._refuse_unknown(name, f"components[{name!r}]")
        listing = self._listing(name)
        assert listing is not None
        return untyped.component_class(*listing)

    def _refuse_unknown(self, name: str, setting: str, *others: str) -> None:
        """Refuses the name of a component that the base does not have, nor is one of ``others``."""
        known = sorted([one for one in self._index if self._listing(one) is not None] + list(others))
        if name not in known:
            _refuse_name(name, setting, self.base.name, known)

    def _quantization(self) -> Mapping[str, Any]:
        """The config of each component that is quantized; of each GGUF file, too."""
        libraries: dict[str, str] = {}
        for name in self._index:
            listing = self._listing(name)
            if listing is not None and listing[0] in ("diffusers", "transformers") and _has_weights(self._class(name)):
                libraries[name] = listing[0]
        denoisers = [name for name in libraries if is_denoiser(name) and not name.startswith("controlnet")]
        configs = Quantization(self.config.quantization_config, libraries, denoisers).configs
        for name, how in configs.items():
            gguf = "gguf" in str(how.quant_method).lower()
            where = self._parts.get(name)
            if gguf != (where is not None and where.lower().endswith(".gguf")):
                mend = (
                    f"GGUF files are quantized already; give one as components={{{name!r}: 'FILE.gguf'}}"
                    if gguf
                    else "a GGUF file is quantized already; leave this component out of quantization_config"
                )
                raise ConfigError(f"quantization_config: {type(how).__name__} for {name!r}: {mend}")
        return configs

    def _component(self, name: str, where: str | None, quantization: Mapping[str, Any]) -> Any:
        """One component that is not the base's own."""
        if where is None:
            if name not in (known := left_out.names(self._index)):
                _refuse_name(name, f"components[{name!r}]", self.base.name, known)
            left_out.refuse(name, self._parts, self._index)
            return None
        cls = self._class(name)
        source = sources.find(where, f"components[{name!r}]")
        options: dict[str, Any] = dict(self._hub)
        if _has_weights(cls):
            options["dtype"] = _of(self._dtype, name)
            if name in quantization:
                options["quantization_config"] = quantization[name]
        if source.kind == "file":
            return self._from_file(name, cls, source, options)
        if source.kind == "factory":
            raise ConfigError(f"components[{name!r}]={where!r}: a factory makes a whole pipeline; give it as model=")
        if source.kind == "hub":
            return _from_hub(name, cls, source, options)
        folder = Path(source.name)
        if (folder / sources.INDEX).is_file():
            folder = folder / name
        found = _class_in(folder, cls)
        if roles.of(found) != roles.of(cls):
            raise ConfigError(
                f"components[{name!r}]={where!r}: {roles.told(found)}; the pipeline wants {roles.of(cls)}"
            )
        return found.from_pretrained(str(folder), **options)

    def _from_file(self, name: str, cls: Any, source: Source, options: dict[str, Any]) -> Any:
        if not hasattr(cls, "from_single_file"):
            raise ConfigError(
                f"components[{name!r}]={source.name!r}: {cls.__name__} does not load from a single file; give a folder"
            )
        if source.gguf and "quantization_config" not in options:
            compute = options["dtype"]
            options["quantization_config"] = untyped.quantization_configs("diffusers")["gguf"](compute_dtype=compute)
        options |= {"config": self.base.name, "subfolder": name}
        return cls.from_single_file(source.name, **options)


def _refuse_name(name: str, setting: str, base: str, known: list[str]) -> NoReturn:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f", but {', '.join(known)}"
    raise ConfigError(f"{setting}: {base} has no such component{hint}")


def _from_hub(name: str, cls: Any, source: Source, options: dict[str, Any]) -> Any:
    """A repository of one component, or the component of that name in a model's."""
    try:
        index = untyped.model_index(source.name, local_files_only=options["local_files_only"])
    except OSError:  # it has no index
        return cls.from_pretrained(source.name, **options)
    entry = index.get(name)
    if isinstance(entry, (list, tuple)) and entry[0] == "diffusers":
        cls = untyped.component_class(entry[0], entry[1])
    return cls.from_pretrained(source.name, subfolder=name, **options)


def _class_in(folder: Path, listed: Any) -> Any:
    """The class that a component's own configuration names, which may be another than the pipeline's (a tiny VAE)."""
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            own = json.loads((folder / name).read_text()).get("_class_name")
            return listed if own is None else untyped.component_class("diffusers", own)
    return listed


def _has_weights(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _of(dtype: Any, name: str) -> torch.dtype:
    """The dtype of one component."""
    return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
