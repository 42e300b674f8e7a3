"""What is finished of a model that is being quantized, on disk: a run that was stopped goes on.

The folder has a name of its own, hidden beside the one that is wanted, and is never taken for a
model. Each file is written under another name first, so that what is there is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.checkpoint import native
from qjax.errors import CheckpointError


@dataclass(frozen=True)
class Finished:
    """A layer that is done.

    Attributes:
      index: its number; None for embedding and head.
      tree: its parameters, QArrays and arrays, by name ("model.layers.0.mlp.up_proj.weight").
      errors: for each weight that was rounded, see `steps.Layer`.
    """

    index: int | None
    tree: dict[str, Any]
    errors: dict[str, float]


@dataclass(frozen=True)
class State:
    """Attributes:
    folder: where it lies; made when there is something to keep.
    """

    folder: Path

    @classmethod
    def beside(cls, output: Path, fingerprint: str) -> State:
        """For a model that is to lie in `output`; other settings have another fingerprint."""
        path = output.absolute()
        return cls(path.parent / f".{path.name}.{fingerprint}.unfinished")

    def done(self, num_layers: int) -> int:
        """How many layers are finished, from the first on."""
        counts = [n for n in range(1, num_layers + 1) if self._hidden(n).exists()]
        return max(counts, default=0)

    def hidden(self, count: int) -> np.ndarray:
        """The hidden states behind so many layers."""
        try:
            return np.load(self._hidden(count), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(self._hidden(count), error) from error

    def layer(self, index: int) -> Finished:
        """What `keep` was given."""
        file = self._layer(index)
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                parts = {name: arrays[name] for name in arrays.files}
            told = json.loads(parts.pop("").tobytes())
            tree = native.restore(parts, told["static"], file)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise self._damaged(file, error) from error
        return Finished(index, tree, told["errors"])

    def keep(self, done: Finished, hidden: np.ndarray) -> None:
        """Keeps a layer, with the hidden states behind it."""
        assert done.index is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays, static = native.describe(done.tree)
        told = json.dumps({"static": static, "errors": done.errors}).encode()
        arrays[""] = np.frombuffer(told, np.uint8)
        _write(self._layer(done.index), lambda file: np.savez(file, **arrays))
        _write(self._hidden(done.index + 1), lambda file: np.save(file, hidden))
        self._hidden(done.index).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.npz"

    def _hidden(self, count: int) -> Path:
        return self.folder / f"hidden-{count:05}.npy"

    def _damaged(self, file: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot be read ({error}): remove the folder {self.folder} to begin anew", file=file
        )


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
