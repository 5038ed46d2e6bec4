"""What diffusers and the hub say when a model cannot be loaded, as a ``ConfigError`` with the mend."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator

import torch

from steploom.config import EngineConfig
from steploom.errors import ConfigError

_UNREACHABLE = ("ConnectError", "ConnectionError", "ConnectTimeout", "NetworkError", "ReadTimeout", "MaxRetryError",
                "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")  # fmt: skip


@contextlib.contextmanager
def explained(config: EngineConfig) -> Generator[None]:
    """Turns what goes wrong with a model into a :class:`~steploom.errors.ConfigError` that says how to mend it.

    Faults that are not the settings' (out of memory, an error in a factory) pass as they are.

    Raises:
        ConfigError: The model cannot be loaded with these settings.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(_mend(config, error, said)) from error
    except RuntimeError as error:
        if config.quantization_config is not None and "No GPU found" in str(error):
            raise ConfigError(
                f"quantization_config={config.quantization_config!r}: bitsandbytes needs a GPU, and torch sees none; "
                "quantize with torchao, which needs none, or leave it out"
            ) from error
        if isinstance(error, torch.OutOfMemoryError) or "size mismatch" not in str(error):
            raise
        raise ConfigError(f"model={config.model!r}: the weights do not fit the configuration: {error}") from error


def _mend(config: EngineConfig, error: BaseException, said: str) -> str:
    """The whole message."""
    kinds = _kinds(error)
    model = f"model={config.model!r}"
    if "trust_remote_code" in said:
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
        return (
            f"local_files_only=True: {model} is not, or not completely, in the hub's cache; load it once with "
            "local_files_only=False, or give a folder"
        )
    if kinds & set(_UNREACHABLE):
        return (
            f"{model}: is no folder here, is not in the hub's cache, and the hub cannot be reached; check the "
            f"spelling and the network (HF_ENDPOINT, proxies), or give a folder ({said})"
        )
    if isinstance(error, ImportError):
        return f"{model}: needs a package that is not installed or does not import: {said}"
    return f"{model}: could not be loaded: {said}"


def _kinds(error: BaseException | None) -> set[str]:
    """The names of the classes of ``error`` and of what it came from."""
    names: set[str] = set()
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names
