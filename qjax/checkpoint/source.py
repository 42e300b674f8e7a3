"""From what a user names to files on disk: a path, a built-in name, or a repository of the hub."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qjax.checkpoint import builtin, detect, orbax_folder, unpickle
from qjax.errors import CheckpointError, DownloadError

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<variant>[\w.-]+))?")
_SUFFIXES = (".gguf", ".safetensors")
_CONFIG = "config.json"
_FORMS = (
    "a .gguf file, a folder with safetensors or one GGUF file, a built-in name "
    f"({', '.join(builtin.MODELS)}), or org/name or org/name:Q4_K_M on the Hugging Face hub"
)


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
      kind: "gguf", "safetensors", "pickle" or "orbax".
      path: the GGUF file, the folder (or file) of safetensors, or the folder of the others.
      name: as the user may call it, for messages.
      license: name of the licence, "" where the source does not say.
    """

    kind: Literal["gguf", "safetensors", "pickle", "orbax"]
    path: Path
    name: str
    license: str = ""


def resolve(source: str | os.PathLike[str]) -> Source:
    """Finds a model, downloading it where necessary.

    In this order: a local file or folder, a built-in name, "org/name" or "org/name:VARIANT" on the
      hub.

    Raises:
      CheckpointError: a local path that is not a model.
      DownloadError: nothing of this name is known, or it could not be fetched.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(path)
    looks_like_path = name.startswith((".", "~", os.sep)) or path.suffix in _SUFFIXES
    if not isinstance(source, str) or looks_like_path:
        raise DownloadError(f"{name}: no such file or folder; qjax takes {_FORMS}")
    if name in builtin.MODELS:
        return Source("gguf", builtin.fetch(name), name, builtin.MODELS[name].license)
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        close = difflib.get_close_matches(name.lower(), builtin.MODELS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise DownloadError(f"{name!r} is not a model that can be found: {hint}qjax takes {_FORMS}")

    from qjax.checkpoint import hub

    path, license_name = hub.fetch(match["repo"], match["variant"])
    kind = "gguf" if path.suffix == ".gguf" else "safetensors"
    return Source(kind, path, name, license_name)


def resolve_config(source: str | os.PathLike[str]) -> Path:
    """Where it is written what a model is: a config.json or a GGUF file. Of a repository of the
    hub, nothing else is fetched.

    Raises:
      CheckpointError, DownloadError: as `resolve`; or there is no config.json.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.name == _CONFIG and path.is_file():
        return path
    match = _HUB_NAME.fullmatch(name)
    if not path.exists() and isinstance(source, str) and match and name not in builtin.MODELS:
        from qjax.checkpoint import hub

        return hub.fetch(match["repo"], only=_CONFIG)[0]
    if path.is_dir() and (path / _CONFIG).is_file():
        return path / _CONFIG
    found = resolve(source)
    if found.kind == "gguf":
        return found.path
    raise CheckpointError(f"stands without a {_CONFIG}, which says what the model is", file=name)


def _local(path: Path) -> Source:
    if path.is_dir():
        if (path / orbax_folder.FILE).is_file():
            return Source("orbax", path, path.resolve().name)
        if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
            return Source("safetensors", path, path.resolve().name)
        # Of a split file, the first part stands for all.
        found = [
            file
            for file in sorted(path.glob("*.gguf"))
            if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", file.stem) and "mmproj" not in file.name
        ]
        if len(found) == 1:
            return Source("gguf", found[0], path.resolve().name)
        if found:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"holds several GGUF files, name one of them: {names}", file=path)
        if unpickle.is_pickled(path) and _is_torchao(path):
            return Source("pickle", path, path.resolve().name)
        raise CheckpointError(
            "folder holds neither safetensors nor GGUF files; pickled weights (.bin, .pt) are not "
            "read, but for those of TorchAO: save them as safetensors first",
            file=path,
        )
    if path.suffix == ".safetensors":
        return Source("safetensors", path, path.stem)
    if path.suffix == ".gguf" or _starts_as_gguf(path):
        return Source("gguf", path, path.stem)
    raise CheckpointError("is neither a GGUF nor a safetensors file", file=path)


def _is_torchao(folder: Path) -> bool:
    """Whether tensors of TorchAO's classes are expected, which its older versions only pickled."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    found, _ = detect.find(folder, detect.read_json(config))
    return found is not None and found.get("quant_method") == "torchao"


def _starts_as_gguf(path: Path) -> bool:
    # Files in a cache are often named by their hash.
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
