"""Where a LoRA is: a file, a folder, or a repository of the hub, asked for once and without waiting long."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from steploom.errors import InvalidRequest


def identity(where: str) -> Hashable:
    """Changes when the file at ``where`` does, so that a new file under an old name is loaded."""
    path = Path(where).expanduser()
    if not path.exists():
        return where
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return (str(path.resolve()), *map(_version, files))


def _version(file: Path) -> Hashable:
    about = file.stat()  # who copies a file with its time (cp -p) leaves that of the change, and another inode
    return (str(file), about.st_ino, about.st_ctime_ns, about.st_mtime_ns, about.st_size)


def place(where: str, timeout_s: float, *, local_files_only: bool) -> tuple[str, str | None]:
    """Where diffusers is to look, and for which file: it asks the hub for a file's name unless told.

    Args:
        where: File, folder or repository of the hub.
        timeout_s: Seconds that the hub may take to answer.
        local_files_only: Do not ask it.

    Raises:
        InvalidRequest: There is nothing, or nothing that can be reached.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return str(path.parent), path.name
    if path.is_dir():
        if not any(file.suffix in (".safetensors", ".bin", ".pt") for file in path.iterdir()):
            raise InvalidRequest("holds no file of weights", field="lora")
        return str(path), None
    owner, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise InvalidRequest("is no file or folder here; check the path, or give another", field="lora")
    return _of_hub(f"{owner}/{name}", file or None, timeout_s, local_files_only)


def _of_hub(repository: str, file: str | None, timeout_s: float, local_files_only: bool) -> tuple[str, str | None]:
    """The repository if the hub answers, else its folder in the hub's cache.

    diffusers would try to reach the hub for most of a minute, and ignores ``local_files_only`` where no file is named.
    """
    why = "local_files_only=True" if local_files_only else None
    if why is None:
        try:
            HfApi().model_info(repository, timeout=timeout_s)
        except RepositoryNotFoundError:
            raise InvalidRequest(
                "is no file or folder here, and the hub has no such repository, or it is private; check the spelling, "
                "log in (`hf auth login`, or HF_TOKEN), or give a file",
                field="lora",
            ) from None
        except Exception as fault:  # noqa: BLE001 - its HTTP library changes with its version: told to the request
            why = f"the hub cannot be reached ({type(fault).__name__})"
        else:
            return repository, file
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        folder = None
    if folder is None or not (file is None or (folder / file).is_file()):
        raise InvalidRequest(
            f"is no file or folder here, nor in the hub's cache, and {why}; check the spelling and the network, or "
            "give a file",
            field="lora",
        )
    return str(folder), file
