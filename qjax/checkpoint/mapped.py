"""Tensors that lie in memory-mapped files: what the GGUF and safetensors readers have in common.

Nothing is read until a tensor is asked for, and nothing is copied then: a tensor is a read-only
numpy view of the page cache. `release` gives the pages back once a tensor has been used.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from qjax.errors import CheckpointError, UnsupportedError

# Element types that numpy and ml_dtypes can view in place: a dtype name for `np.dtype`.
VIEWS = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8_e4m3": "float8_e4m3fn",
    "f8_e4m3fnuz": "float8_e4m3fnuz",
    "f8_e5m2": "float8_e5m2",
    "f8_e5m2fnuz": "float8_e5m2fnuz",
    "f8_e8m0": "float8_e8m0fnu",
    "c64": "complex64",
    "bool": "bool",
} | {f"{kind[0]}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies.

    Attributes:
      name: as the file has it.
      qtype: element or block type in lower case, such as "f32", "bf16", "f8_e4m3", "q4_k",
        "iq2_xxs".
      shape: logical shape in numpy order, the contiguous axis last.
      file: path of the file.
      offset: first byte, counted from the start of the file.
      nbytes: stored size.
    """

    name: str
    qtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def map_file(path: str | os.PathLike[str], smallest: int) -> mmap.mmap:
    """Maps a regular file of at least `smallest` bytes for reading.

    Raises:
      CheckpointError: the file is missing, unreadable, not a regular file, or too short.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"cannot be opened: {error}", file=path) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError("not a regular file", file=path)
    if status.st_size < smallest:
        raise CheckpointError(
            f"{status.st_size} bytes are too few for a header of {smallest}: "
            "the file is cut short or not a checkpoint",
            file=path,
            offset=0,
        )
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be mapped: {error}", file=path) from error


class TensorFiles:
    """The tensors of one checkpoint, in one or several mapped files; a context manager.

    Attributes:
      path: the file (the first, of several) or folder that was opened.
      tensors: name -> TensorRecord, in file order.
      metadata: what the header says beside the tensors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        maps: dict[str, mmap.mmap],
        tensors: dict[str, TensorRecord],
        metadata: dict[str, Any],
    ):
        self.path: str = os.fspath(path)
        self.tensors = tensors
        self.metadata = metadata
        self._maps = maps

    def _record(self, name: str) -> TensorRecord:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                "no such tensor in this checkpoint", file=self.path, field=name
            ) from None

    def raw(self, name: str) -> np.ndarray:
        """Stored bytes of a tensor: a read-only uint8 view [*shape[:-1], bytes per row].

        Sub-byte types whose rows do not end at a byte come flat. Raises CheckpointError for an
        unknown name.
        """
        record = self._record(name)
        data = np.frombuffer(self._maps[record.file], np.uint8, record.nbytes, record.offset)
        rows = int(np.prod(record.shape[:-1], dtype=np.int64))
        if rows == 0 or record.nbytes % rows:
            return data
        return data.reshape(*record.shape[:-1], record.nbytes // rows)

    def array(self, name: str) -> np.ndarray:
        """A tensor of a plain element type as a read-only view of its shape, nothing copied.

        Raises:
          UnsupportedError: the tensor is stored in blocks or in elements of less than a byte: use
            `raw`.
        """
        record = self._record(name)
        if record.qtype not in VIEWS:
            raise UnsupportedError(
                f"{record.file}, {name}: {record.qtype} is not a plain element type; use raw()"
            )
        dtype = _dtype(VIEWS[record.qtype])
        count = record.nbytes // dtype.itemsize
        data = np.frombuffer(self._maps[record.file], dtype, count, record.offset)
        return data.reshape(record.shape)

    def is_plain(self, name: str) -> bool:
        """Whether `array` can view the tensor."""
        return self._record(name).qtype in VIEWS

    def release(self, name: str) -> None:
        """Tells the system that the pages of this tensor are not needed now; views of it stay
        valid.
        """
        record = self._record(name)
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Only whole pages: those at the edges may hold a neighbour.
        start = -(-record.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (record.offset + record.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._maps[record.file].madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmaps the files; a file that arrays still look into stays mapped until they are gone."""
        close_maps(self._maps.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_maps(maps: Iterable[mmap.mmap]) -> None:
    """Unmaps every map that no array looks into."""
    for mapped in maps:
        with contextlib.suppress(BufferError):
            mapped.close()


def _dtype(name: str) -> np.dtype:
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)
