"""What diffusers and the hub say when a model cannot be loaded, as a ``ConfigError`` with the mend."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from steploom.config import EngineConfig
from steploom.errors import ConfigError, raised
from steploom.weave import exits
from steploom.weave.machine_faults import is_of_machine
from steploom.worker.models import broken_files, indexes, sources

_TELLING = (OSError, ValueError, ImportError)
"""What is raised with a sentence."""

_NO_LIBRARY = "is not one of the libraries"
_NO_TASK = "AutoPipeline can't find a pipeline linked to"
"""What diffusers says of an index that names a library of somebody's, without code in the folder; and where a task is
asked for of a pipeline of somebody's."""

_NO_CLASS = re.compile(r"module diffusers has no attribute (\w+)")

_UNFIT = ("size mismatch", "expected shape", "ignore_mismatched_sizes")
"""What torch, diffusers and transformers say of weights of other shapes than the model's."""

_QUANTIZERS = ("/quantizers/", "/torchao/")
_CONVERTERS = ("/diffusers/loaders/single_file",)
"""Where diffusers and transformers quantize, and where single files are converted."""

_UNREACHABLE = ("ConnectError", "ConnectionError", "ConnectTimeout", "NetworkError", "ReadTimeout", "MaxRetryError",
                "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")  # fmt: skip


@contextlib.contextmanager
def explained(config: EngineConfig, component: str | None = None) -> Generator[None]:
    """Turns what goes wrong with a model into a :class:`~steploom.errors.ConfigError` that says how to mend it.

    The device's own faults (out of memory) pass as they are.

    Args:
        config: The engine's settings.
        component: That which is loaded, of ``config.components``; None for the whole model.

    Raises:
        ConfigError: The model cannot be loaded with these settings.
    """
    where = (config.components or {}).get(component or "")  # a single file that is the model is a component, too
    model = _Model(config, "model", config.model)
    if where is not None:
        model = _Model(config, f"components[{component!r}]", where)
    try:
        yield
    except ConfigError:
        raise
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if config.quantization_config is not None and "No GPU found" in said:
            raise ConfigError(
                f"quantization_config={config.quantization_config!r}: bitsandbytes needs a GPU, and torch sees none; "
                "quantize with torchao, which needs none, or leave it out"
            ) from error
        if is_of_machine(error):
            raise
        raise ConfigError(_unexplained(model, error, said)) from error
    except MemoryError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or exits.is_strangers(error)):
            raise
        said = " ".join(str(error).split())
        if not isinstance(error, _TELLING):  # which are no sentences: KeyError: 'vae'
            said = f"{type(error).__name__}: {said}"
        raise ConfigError(_mend(model, error, said)) from error


@contextlib.contextmanager
def own_factory(config: EngineConfig) -> Generator[None]:
    """Turns what a factory raises into a :class:`~steploom.errors.ConfigError` that says where it did.

    Raises:
        ConfigError: It raised something; what the device says passes as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        of_machine = isinstance(error, (RuntimeError, MemoryError)) and is_of_machine(error)
        if of_machine or not (isinstance(error, Exception) or exits.is_strangers(error)):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = raised(error)
        raise ConfigError(f"model={config.model!r}: raised {words} ({frame.filename}, line {frame.lineno})") from error


class _Model(NamedTuple):
    """What was loaded: the whole model or a component, by its setting, and what that names."""

    config: EngineConfig
    setting: str
    name: str

    def __str__(self) -> str:
        return f"{self.setting}={self.name!r}"

    @property
    def path(self) -> Path | None:
        """The folder or file, if it is one here."""
        source = sources.find(self.name, self.setting)
        return Path(source.name) if source.kind in ("folder", "file") and not source.name.startswith("http") else None


def _mend(model: _Model, error: BaseException, said: str) -> str:
    """The whole message."""
    config, kinds = model.config, _kinds(error)
    if config.quantization_config is not None and _raised_in(error, _QUANTIZERS):
        what = "install what it asks for, or choose another backend" if isinstance(error, ImportError) else "change it"
        return f"quantization_config={config.quantization_config!r}: {said}; {what}"
    if "trust_remote_code" in said and _NO_LIBRARY not in said:
        return (
            f"trust_remote_code=False: {model} brings Python code along, which would run here; read it, and set "
            f"trust_remote_code=True if you trust it ({said})"
        )
    if config.variant is not None and re.search(r"variant", said, re.IGNORECASE):
        return f"variant={config.variant!r}: {model} has no such weights; leave variant out, or give one that it has"
    if "RevisionNotFoundError" in kinds:
        return f"revision={config.revision!r}: {model} has no such branch, tag or commit on the hub"
    if "GatedRepoError" in kinds:
        return f"{model}: is gated; accept its conditions on its page, and log in (`hf auth login`, or HF_TOKEN)"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{model}: the hub has no such model, or it is private; check the spelling, log in (`hf auth login`, or "
            "HF_TOKEN), or give a folder"
        )
    if config.local_files_only and "LocalEntryNotFoundError" in kinds:
        return _not_cached(config, model)
    if kinds & set(_UNREACHABLE):
        return (
            f"{model}: is no folder here, is not in the hub's cache, and the hub cannot be reached; check the "
            f"spelling and the network (HF_ENDPOINT, proxies), or give a folder ({said})"
        )
    if config.task is not None and _NO_TASK in said:
        return (
            f"task={config.task!r}: {model} is a pipeline of its own, of which no other task is known; leave task out"
        )
    if isinstance(error, ImportError):
        return f"{model}: needs a package that is not installed or does not import: {said}"
    if found := _NO_CLASS.search(said):
        return f"{model}: {indexes.unknown_class(found[1])}"
    return _unexplained(model, error, said)


def _unexplained(model: _Model, error: BaseException, said: str) -> str:
    """What was said, with what can be seen in the model's folder."""
    path = model.path
    named = [Path(name) for name in re.findall(r"'([^']+)'", said)]  # in the hub's cache, or of the base
    for place in (path, *(file for file in named if file.is_file())):
        if place is not None and (fault := broken_files.broken(place)) is not None:
            return f"{model}: {fault}"
    if any(words in said for words in _UNFIT):
        advice = said.find(" If you want to instead")  # of what to pass to methods that nobody calls here
        unfit = said if advice < 0 else said[:advice]
        return f"{model}: the weights do not fit the configuration; give a folder as it was saved ({unfit})"
    if path is not None and path.is_file() and _raised_in(error, _CONVERTERS):
        return f"{model}: holds no weights of that kind, or under names that diffusers does not know ({said})"
    folder = path if path is not None and path.is_dir() else None
    if folder is not None and model.config.variant is None and (variants := indexes.variants(folder)):
        return f"{model}: has weights of variant={' or '.join(map(repr, variants))} alone; give that ({said})"
    lacking = indexes.missing(folder) if folder is not None else []
    hint = f" (it has no folder {' nor '.join(lacking)}, which its {sources.INDEX} lists)" if lacking else ""
    return f"{model}: could not be loaded: {said}{hint}"


def _raised_in(error: BaseException, places: tuple[str, ...]) -> bool:
    """Whether a file of diffusers' or transformers' whose path has one of ``places`` in it was at work."""
    files = (frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__))
    return any(place in file for file in files for place in places)


def _not_cached(config: EngineConfig, model: _Model) -> str:
    if config.base_model is None and sources.find(config.model).kind == "file":
        return (
            f"base_model=None: {model} is one file, and what it does not hold is not in the hub's cache; give the "
            "folder, in diffusers layout, of a model of the same kind, or local_files_only=False"
        )
    return (
        f"local_files_only=True: {model} is not, or not completely, in the hub's cache; load it once with "
        "local_files_only=False, or give a folder"
    )


def _kinds(error: BaseException | None) -> set[str]:
    """The names of the classes of ``error`` and of what it came from."""
    names: set[str] = set()
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names
