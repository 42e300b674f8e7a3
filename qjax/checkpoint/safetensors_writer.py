"""Writes safetensors: one file, or several with an index.

The layout is that of github.com/huggingface/safetensors, see `safetensors_io`. Within a file,
tensors of wide elements come first, so that each lies at a multiple of its element size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.checkpoint.mapped import VIEWS
from qjax.checkpoint.safetensors_io import INDEX_NAME, SINGLE_NAME
from qjax.errors import UnsupportedError

SHARD_BYTES = 5_000_000_000

# numpy or ml_dtypes name of an element -> name in the header.
_DTYPES = {dtype: qtype.upper() for qtype, dtype in VIEWS.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor in the scratch file of its shard."""

    name: str
    dtype: str
    width: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass
class SafetensorsWriter:
    """Takes tensors one by one, holds none of them, and writes the files of a folder.

    A header comes before the data that it describes, so the data of a shard waits in a scratch
    file until the shard is full.

    Attributes:
      folder: an empty folder.
      metadata: texts for the headers.
      shard_bytes: a file is closed before its data grow beyond this.
    """

    folder: Path
    metadata: Mapping[str, str]
    shard_bytes: int = SHARD_BYTES
    _entries: list[_Entry] = field(default_factory=list)
    _shards: list[list[str]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _size: int = 0
    _total: int = 0
    _data: BinaryIO | None = None

    def add(self, name: str, array: Any) -> None:
        """Appends a tensor.

        Raises:
          ValueError: there is one of this name already.
          UnsupportedError: safetensors has no such elements.
        """
        array = np.asarray(array)
        dtype = _DTYPES.get(array.dtype.name)
        if dtype is None:
            raise UnsupportedError(f"{name}: safetensors holds no elements of type {array.dtype}")
        if name in self._names:
            raise ValueError(f"{name} is written twice")
        if self._entries and self._size + array.nbytes > self.shard_bytes:
            self._end_shard()
        if self._data is None:
            self._data = open(self.folder / "scratch", "w+b")  # noqa: SIM115
        self._names.add(name)
        self._entries.append(
            _Entry(name, dtype, array.dtype.itemsize, array.shape, self._size, array.nbytes)
        )
        self._data.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._size += array.nbytes
        self._total += array.nbytes

    def close(self) -> None:
        """Writes what is left, and the index where there are several files."""
        self._end_shard()
        if len(self._shards) == 1:
            os.rename(self.folder / "shard-1", self.folder / SINGLE_NAME)
            return
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            os.rename(self.folder / f"shard-{number}", self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Closes the scratch file of a folder that is to be deleted."""
        if self._data is not None:
            self._data.close()

    def _end_shard(self) -> None:
        """Header and data of the tensors so far, as the file of the next shard."""
        entries = sorted(self._entries, key=lambda entry: (-entry.width, entry.name))
        header: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        start = 0
        for entry in entries:
            offsets = [start, start + entry.nbytes]
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
            start += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._shards.append([entry.name for entry in entries])
        with open(self.folder / f"shard-{len(self._shards)}", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if self._data is not None:
                for entry in entries:
                    self._data.seek(entry.offset)
                    _copy(self._data, file, entry.nbytes)
                self._data.close()
                (self.folder / "scratch").unlink()
        self._data, self._entries, self._size = None, [], 0


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(count, shutil.COPY_BUFSIZE))  # type: ignore[attr-defined]
        target.write(piece)
        count -= len(piece)
