"""What ``EngineConfig.model`` names: a folder, a hub id, a single file or a factory; and what goes with each."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

from steploom import demo
from steploom.config import EngineConfig, expanded
from steploom.errors import ConfigError

Kind = Literal["folder", "hub", "file", "factory"]

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""How the names of single-file checkpoints end."""

INDEX = "model_index.json"
"""What a folder in diffusers layout holds."""

MODULAR_INDEX = "modular_model_index.json"
"""What the folder of a modular pipeline holds."""

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/[^/]+/[^/]+/.+")
_WOULD_DO = "a folder, a hub id ('owner/name'), a single-file checkpoint or its address, or 'pkg.module:factory'"

_CLASSES = {"UNet": "unet", "Transformer": "transformer", "Autoencoder": "vae"}
"""Parts of the names of classes, and the component that such a one is."""

_REFUSED: dict[str, tuple[tuple[Kind, ...], str]] = {
    "variant": (("file", "factory"), "variants are files of a folder or of a hub id; give the file that you want"),
    "revision": (("folder", "factory"), "revisions are versions of a hub id; a folder has one only"),
    "base_model": (("folder", "hub", "factory"), "it goes with a single-file checkpoint; give this one alone"),
    "components": (("factory",), "the factory makes the whole pipeline; put the components in there"),
    "quantization_config": (("factory",), "the factory makes the whole pipeline; quantize in there"),
}
"""With which kinds a setting is of no effect, and what to do instead."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: What it is.
        name: Its path, hub id or address, or ``"pkg.module:factory"``.
    """

    kind: Kind
    name: str

    @property
    def gguf(self) -> bool:
        """Whether it is a checkpoint in llama.cpp's format, quantized as it is."""
        return self.kind == "file" and self.name.lower().endswith(".gguf")


def find(model: str, field: str = "model") -> Source:
    """What ``model`` names.

    Args:
        model: As the setting says.
        field: Which setting, for messages.

    Raises:
        ConfigError: Nothing of that name can be a model, or its ``~`` is nobody's home.
    """
    if model == "demo":
        return Source("folder", str(demo.path()))
    if _ADDRESS.fullmatch(model):
        return Source("file", model)
    path = expanded(model, field)
    if path.is_dir():
        return Source("folder", str(path))
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{field}={model!r}: is a file, but no checkpoint; those end in {', '.join(SUFFIXES)}")
        return Source("file", str(path))
    if _FACTORY.fullmatch(model) and len(model.partition(":")[0]) > 1:  # C:model is a path
        return Source("factory", model)
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or model.startswith((".", "~")):
        if model.count("/") > 1 and not path.is_absolute() and not Path(path.parts[0]).exists():
            return Source("file", f"https://huggingface.co/{model}")  # owner/name/file: a file of a hub id
        raise ConfigError(f"{field}={model!r}: there is no such file or folder here ({Path.cwd()})")
    if _HUB_ID.fullmatch(model):
        return Source("hub", model)
    raise ConfigError(f"{field}={model!r}: must be 'demo', {_WOULD_DO}")


def refuse(config: EngineConfig, source: Source) -> None:
    """Refuses settings that would be without effect on what ``config.model`` is.

    Raises:
        ConfigError: Names the setting, its value and the mend.
    """
    for name, (kinds, mend) in _REFUSED.items():
        value = getattr(config, name)
        if value is not None and source.kind in kinds:
            raise ConfigError(f"{name}={value!r}: model={config.model!r} is a {source.kind}: {mend}")
    if isinstance(config.dtype, dict) and source.kind in ("file", "factory"):
        raise ConfigError(
            f"dtype={config.dtype!r}: model={config.model!r} is a {source.kind}, whose components have one dtype; "
            "give one, such as dtype='bfloat16'"
        )
    if source.kind == "folder" and not (Path(source.name) / INDEX).is_file():
        raise ConfigError(f"model={config.model!r}: {_what_is_wrong_with(Path(source.name))}")


def _as_component(folder: Path) -> str:
    """The setting for a folder of one component, by the class that its configuration names, else by its own name."""
    try:
        said = str(json.loads((folder / "config.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        said = ""
    if "ControlNet" in said:
        return f"controlnet={str(folder)!r}"
    named = next((name for part, name in _CLASSES.items() if part in said), folder.name)
    return f"components={{{named!r}: {str(folder)!r}}}"


def _what_is_wrong_with(folder: Path) -> str:
    """Why a folder without an index is no pipeline."""
    if (folder / MODULAR_INDEX).is_file():
        return (
            f"is a modular pipeline ({MODULAR_INDEX}), and those are not served; give a folder with a {INDEX}, which "
            "save_pretrained of a DiffusionPipeline writes"
        )
    if (folder / "config.json").is_file():
        return (
            f"holds one component (config.json), not a pipeline ({INDEX}); give the pipeline's folder as model=, and "
            f"this one as {_as_component(folder)}"
        )
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and (path / INDEX).is_file())
    if inner:
        return f"holds no {INDEX}, but {', '.join(inner)} in it does; give that folder"
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if files:
        return f"holds no {INDEX}, but single files; give one of them: {', '.join(files[:4])}"
    return f"holds no {INDEX}; give a folder written by save_pretrained"
