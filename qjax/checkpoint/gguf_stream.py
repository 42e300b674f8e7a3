"""Writes a GGUF file, version 3, tensor by tensor.

The layout is that of `gguf_io`. Names and shapes are known before any data, types are not: the
header has its final length from the start, and is written again when all data are there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.checkpoint.gguf_io import ARRAY, HEADER, MAGIC, SCALARS, STRING, TYPES
from qjax.errors import CheckpointError

Metadata = Mapping[str, Any]
"""Key -> str, bool, int, float, list of str, or a numpy array or number, which keeps its dtype. An
int becomes uint32 (int32 below 0, 64 bits where it needs them), a float float32."""

_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_KINDS = {np.dtype(code): number for number, code in SCALARS.items()}


class GGUFStream:
    """Takes the tensors in the order that was announced; a context manager.

    The file appears under its name when the last was taken and the context left without an error;
    until then its data are beside it, in a file that ends in ".part".
    """

    def __init__(
        self, path: Path, metadata: Metadata, tensors: Sequence[tuple[str, tuple[int, ...]]]
    ):
        """Args:
        tensors: name and shape of each, in numpy order.
        """
        self.path = path
        self._work = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._metadata = dict(metadata)
        self._tensors = list(tensors)
        self._types: list[str] = []
        self._alignment = int(self._metadata.get("general.alignment", 32))
        self._file: BinaryIO | None = None

    def __enter__(self) -> GGUFStream:
        self._file = open(self._work, "xb")
        self._file.write(self._header())
        return self

    def add(self, name: str, qtype: str, raw: np.ndarray) -> None:
        """Writes the next tensor: its bytes, in rows of whole blocks of a ggml type."""
        expected, shape = self._tensors[len(self._types)]
        _, elements, size = TYPES[_NUMBERS[qtype]]
        wanted = int(np.prod(shape, dtype=np.int64)) // elements * size
        if name != expected or raw.nbytes != wanted or shape[-1] % elements:
            raise CheckpointError(
                f"{name} {qtype} of {raw.nbytes} bytes where {expected} {shape} was announced",
                file=self.path,
            )
        assert self._file is not None
        self._types.append(qtype)
        self._file.write(np.ascontiguousarray(raw).data)
        self._file.write(bytes(-raw.nbytes % self._alignment))

    def finish(self, metadata: Metadata) -> None:
        """Replaces values that depend on the data by others of the same length."""
        if not metadata.keys() <= self._metadata.keys():
            raise KeyError(f"not announced: {sorted(metadata.keys() - self._metadata.keys())}")
        self._metadata.update(metadata)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        try:
            if kind is None:
                if len(self._types) < len(self._tensors):
                    missing = self._tensors[len(self._types)][0]
                    raise CheckpointError("was announced, but not given", field=missing)
                self._file.seek(0)
                self._file.write(self._header())
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._work, self.path)
        finally:
            self._file.close()
            self._work.unlink(missing_ok=True)

    def _header(self) -> bytes:
        parts = [HEADER.pack(MAGIC, 3, len(self._tensors), len(self._metadata))]
        parts += [_text(key) + _value(key, value) for key, value in self._metadata.items()]
        offset = 0
        for index, (name, shape) in enumerate(self._tensors):
            qtype = self._types[index] if index < len(self._types) else "f32"
            _, elements, size = TYPES[_NUMBERS[qtype]]
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            parts.append(_text(name) + dims + struct.pack("<IQ", _NUMBERS[qtype], offset))
            nbytes = int(np.prod(shape, dtype=np.int64)) // elements * size
            offset += nbytes + -nbytes % self._alignment
        header = b"".join(parts)
        return header + bytes(-len(header) % self._alignment)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _KINDS:
        head = struct.pack("<IIQ", ARRAY, _KINDS[value.dtype], len(value))
        return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    number = _number(value)
    if number is None or number.dtype not in _KINDS:
        raise TypeError(f"{key}: GGUF metadata cannot hold {type(value).__name__}")
    return struct.pack("<I", _KINDS[number.dtype]) + number.tobytes()


def _number(value: Any) -> np.generic | None:
    if isinstance(value, np.generic):
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, int):
        kinds = (np.uint32, np.int32, np.uint64, np.int64)
        fitting = (k for k in kinds if np.iinfo(k).min <= value <= np.iinfo(k).max)
        return next(fitting)(value)
    return None
