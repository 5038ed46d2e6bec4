"""A pipeline from its parts: a folder or hub id, single files, components of other models, or a factory's."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.order import is_denoiser
from steploom.worker.models import component_classes, factories, indexes, left_out, mends, mixed_dtypes, roles, sources
from steploom.worker.models.component_classes import Place
from steploom.worker.models.quantization import Quantization
from steploom.worker.models.sources import Source

_WHOLE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")
"""How the names of tensors begin that a file holds only if it holds more than a denoiser."""


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
        return factories.call(config, source.name, dtype)
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
        self._trusts = config.trust_remote_code
        self._dtype = dtype
        self._parts = parts
        self._hub = {"local_files_only": config.local_files_only}
        # A revision is one of the model; of another repository than that it means nothing.
        self._own = {**self._hub, **({"revision": config.revision} if config.base_model is None else {})}
        self._listed: dict[str, Any] | None = None
        self._others: dict[str, tuple[Place, Any]] = {}

    def from_base(self) -> Any:
        """The base's pipeline, with replaced components."""
        config = self.config
        if isinstance(config.dtype, Mapping):
            for name in config.dtype:
                self._refuse_unknown(name, f"dtype[{name!r}]={config.dtype[name]!r}", "default")
            self._refuse_mixed()
        plain = config.quantization_config is None and not self._parts
        quantization = {} if plain else self._quantization()
        options: dict[str, Any] = {"dtype": self._dtype, "trust_remote_code": config.trust_remote_code, **self._own}
        if config.variant is not None:
            options["variant"] = config.variant
        replaced = {name: self._component(name, where, quantization) for name, where in self._parts.items()}
        remaining = {name: how for name, how in quantization.items() if name not in replaced}
        if remaining:
            options["quantization_config"] = untyped.pipeline_quantization(remaining)
        # Of a component that is code diffusers cannot tell whether another may stand for it: it is put in afterwards.
        late = {name: one for name, one in replaced.items() if one is not None and self._is_code(name)}
        given = {**replaced, **dict.fromkeys(late)}
        pipeline = untyped.load_pipeline(self.base.name, config.task, **options, **given)
        return (
            untyped.sibling(type(pipeline), {**untyped.components_of(pipeline), **late}, pipeline) if late else pipeline
        )

    def _refuse_mixed(self) -> None:
        """Refuses dtypes by component that do not go together."""
        there = [name for name in self._index if self._listing(name) and self._parts.get(name, name) is not None]
        cls = untyped.pipeline_class(str(self._index.get("_class_name")))
        if cls is not None and self.config.task is None:  # of siblings once loaded
            mixed_dtypes.refuse(cls, self.config.dtype, {name: _of(self._dtype, name) for name in there})

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

    def _place(self, name: str) -> Place:
        """Where the base has a component."""
        setting = "model" if self.config.base_model is None else "base_model"
        said = f"{setting}={getattr(self.config, setting)!r}"
        return Place(self.base.name, name, said, self._own, self._trusts)

    def _is_code(self, name: str) -> bool:
        """Whether the base's component is of a class that it brings along."""
        listing = self._listing(name)
        return listing is not None and component_classes.brings_code(self._place(name), listing[0])

    def _class(self, name: str) -> Any:
        """The class of the base's component."""
        listing = self._listing(name)
        assert listing is not None
        return component_classes.of_index(self._place(name), *listing)

    def _other(self, name: str, source: Source) -> tuple[Place, Any]:
        """Where a folder or hub id has what replaces a component, and its class."""
        if name in self._others:
            return self._others[name]
        place = Place(source.name, "", f"components[{name!r}]={self._parts[name]!r}", self._hub, self._trusts)
        try:
            index = untyped.model_index(source.name, **self._hub)
            place = dataclasses.replace(place, inner=name)
        except OSError:
            index = {}
        # Code of the base that is not trusted says nothing of what takes its place.
        listed = None if self._is_code(name) and not self._trusts else self._class(name)
        entry = index.get(name)
        if isinstance(entry, (list, tuple)) and entry[0] and component_classes.brings_code(place, entry[0]):
            found = component_classes.of_index(place, entry[0], entry[1])
        else:
            found = component_classes.of_own(place, listed) or self._class(name)
        if listed is not None and roles.of(found) != roles.of(listed):
            raise ConfigError(f"{place.setting}: {roles.told(found)}; the pipeline wants {roles.of(listed)}")
        self._others[name] = (place, found)
        return place, found

    def _refuse_unknown(self, name: str, setting: str, *others: str) -> None:
        """Refuses the name of a component that the base does not have, nor is one of ``others``."""
        known = sorted([one for one in self._index if self._listing(one) is not None] + list(others))
        if name not in known:
            _refuse_name(name, setting, self.base.name, known)

    def _quantization(self) -> Mapping[str, Any]:
        """The config of each component that is quantized; of each GGUF file, too."""
        classes = {name: self._served(name) for name in self._index if self._listing(name) is not None}
        libraries = {name: library for name, cls in classes.items() if (library := component_classes.library_of(cls))}
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
        self._refuse_unknown(name, f"components[{name!r}]")
        source = sources.find(where, f"components[{name!r}]")
        if source.kind == "factory":
            raise ConfigError(f"components[{name!r}]={where!r}: a factory makes a whole pipeline; give it as model=")
        cls = self._served(name)
        options: dict[str, Any] = {}
        if _has_weights(cls):
            options["dtype"] = _of(self._dtype, name)
            if name in quantization:
                options["quantization_config"] = quantization[name]
        with mends.explained(self.config, name):
            if source.kind == "file":
                return self._from_file(name, cls, source, {**self._hub, **options})
            place, _ = self._other(name, source)
            return cls.from_pretrained(place.source, **place.where, **options)

    def _served(self, name: str) -> Any:
        """The class of a component as it will be served; None for one that is left out."""
        if name in self._parts:
            if (where := self._parts[name]) is None:
                return None
            source = sources.find(where, f"components[{name!r}]")
            if source.kind in ("folder", "hub"):
                return self._other(name, source)[1]
        return self._class(name)

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


def _has_weights(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _of(dtype: Any, name: str) -> torch.dtype:
    """The dtype of one component."""
    return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
