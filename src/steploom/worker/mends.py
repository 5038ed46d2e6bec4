"""What diffusers and the hub say when a model cannot be loaded, as a ``ConfigError`` with the mend."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Generator
from pathlib import Path

from steploom.config import EngineConfig
from steploom.errors import ConfigError, raised
from steploom.weave import exits
from steploom.weave.machine_faults import is_of_machine
from steploom.worker import indexes, sources

_TELLING = (OSError, ValueError, ImportError)
"""What is raised with a sentence."""

_NO_LIBRARY = "is not one of the libraries"
_NO_TASK = "AutoPipeline can't find a pipeline linked to"
"""What diffusers says of an index that names a library of somebody's, without code in the folder; and where a task is
asked for of a pipeline of somebody's."""

_NO_CLASS = re.compile(r"module diffusers has no attribute (\w+)")

_UNREACHABLE = ("ConnectError", "ConnectionError", "ConnectTimeout", "NetworkError", "ReadTimeout", "MaxRetryError",
                "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")  # fmt: skip


@contextlib.contextmanager
def explained(config: EngineConfig) -> Generator[None]:
    """Turns what goes wrong with a model into a :class:`~steploom.errors.ConfigError` that says how to mend it.

    The device's own faults (out of memory) pass as they are.

    Raises:
        ConfigError: The model cannot be loaded with these settings.
    """
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
        unfit = "the weights do not fit the configuration" if "size mismatch" in said else "could not be loaded"
        raise ConfigError(f"model={config.model!r}: {unfit}: {said}") from error
    except MemoryError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or exits.is_strangers(error)):
            raise
        said = " ".join(str(error).split())
        if not isinstance(error, _TELLING):  # which are no sentences: KeyError: 'vae'
            said = f"{type(error).__name__}: {said}"
        raise ConfigError(_mend(config, error, said)) from error


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


def _mend(config: EngineConfig, error: BaseException, said: str) -> str:
    """The whole message."""
    kinds = _kinds(error)
    model = f"model={config.model!r}"
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
    return _unexplained(config, model, said)


def _unexplained(config: EngineConfig, model: str, said: str) -> str:
    """What was said, with what can be seen in the model's folder."""
    source = sources.find(config.model)
    folder = Path(source.name) if source.kind == "folder" else None
    if folder is not None and config.variant is None and (variants := indexes.variants(folder)):
        return f"{model}: has weights of variant={' or '.join(map(repr, variants))} alone; give that ({said})"
    lacking = indexes.missing(folder) if folder is not None else []
    hint = f" (it has no folder {' nor '.join(lacking)}, which its {sources.INDEX} lists)" if lacking else ""
    return f"{model}: could not be loaded: {said}{hint}"


def _not_cached(config: EngineConfig, model: str) -> str:
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
