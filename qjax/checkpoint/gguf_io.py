"""Reads GGUF files: versions 2 and 3, little-endian, in one piece or split into several.

The layout is that of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md). Every count
and length is held against the bytes that are left before anything of its size is made, so a hostile
header costs no more than an honest one; every fault is one `CheckpointError` that names file, field
and offset.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qjax.checkpoint.gguf_checks import check_metadata
from qjax.checkpoint.mapped import TensorFiles, TensorRecord, close_maps, map_file
from qjax.errors import CheckpointError

# ggml type id -> (name, elements a block, bytes a block).
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 36),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}

MAGIC = b"GGUF"
HEADER = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
STRING, ARRAY = 8, 9
# Metadata value type -> format of one little-endian item, for numpy and struct alike.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U16_TYPE, _U32_TYPE = 2, 4

# The smallest entry that each count can announce, in bytes: key length, one letter, type, one byte
# of value; and name length, one letter, number of dimensions, one dimension, type, offset.
_SMALLEST_VALUE = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
# Far above any real file, and low enough to refuse a file full of the smallest entries at once.
_MOST_ENTRIES = 1 << 16
_MOST_STRINGS = 1 << 22
_LARGEST_ALIGNMENT = 1 << 20
_MOST_DIMENSIONS = 4

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFFile(TensorFiles):
    """An open GGUF file, or all files of a split one.

    Attributes:
      metadata: key -> int, float, bool, str, list of str, or a numpy array for an array of numbers.
        Of a split file, those of its first part.
      tensors: name -> TensorRecord; shapes are in numpy order, so a matrix is (N, K) with K
        contiguous.
      value_types: key -> GGUF's number for the type of its value.
    """

    value_types: dict[str, int]

    def typed(self, key: str) -> np.generic:
        """A number of the metadata in the type that it is stored in."""
        return np.dtype(SCALARS[self.value_types[key]]).type(self.metadata[key])


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file: parses and checks the header, maps the tensors without reading them.

    Of a split file ("name-00001-of-00003.gguf"), any part may be named; the others lie beside it.

    Raises:
      CheckpointError: the file is damaged, cut short, contradicts itself, or a part is missing.
    """
    path = Path(path)
    maps: dict[str, mmap.mmap] = {}
    try:
        first = _Header(path, maps)
        parts = [first]
        count = _split_count(first)
        if count > 1:
            parts = [
                first if part == path else _Header(part, maps)
                for part in _split_paths(first, count)
            ]
            _check_split(parts)
        check_metadata(parts[0].metadata, parts[0].offsets, parts[0].file)
        tensors: dict[str, TensorRecord] = {}
        for part in parts:
            for name, record in part.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor is also in {tensors[name].file}", file=part.file, field=name
                    )
                tensors[name] = record
    except BaseException:
        close_maps(maps.values())
        raise
    file = GGUFFile(path, maps, tensors, parts[0].metadata)
    file.value_types = parts[0].value_types
    return file


class _Header:
    """One file's header, parsed front to back with a cursor."""

    def __init__(self, path: Path, maps: dict[str, mmap.mmap]):
        self.file = os.fspath(path)
        self.buffer = maps[self.file] = map_file(path, HEADER.size)
        self.size = len(self.buffer)
        self.metadata: dict[str, Any] = {}
        self.value_types: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        self.tensors: dict[str, TensorRecord] = {}

        magic, version, tensor_count, value_count = HEADER.unpack_from(self.buffer, 0)
        if magic != MAGIC:
            self.fail(f"starts with {magic!r}, not {MAGIC!r}: not a GGUF file", "magic", 0)
        if version & 0xFFFF == 0 and version:
            self.fail(
                "big-endian file; only little-endian ones are read: convert it with "
                "gguf-convert-endian of the gguf package",
                "version",
                4,
            )
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; versions 2 and 3 are read", "version", 4)
        self.position = HEADER.size
        self.check_count("tensor_count", tensor_count, 8, _SMALLEST_TENSOR, _MOST_ENTRIES)
        self.check_count("kv_count", value_count, 16, _SMALLEST_VALUE, _MOST_ENTRIES)
        for index in range(value_count):
            self.read_pair(f"key {index}")
        self.read_tensors(tensor_count)

    def fail(self, reason: str, field: str, offset: int | None = None) -> NoReturn:
        raise CheckpointError(
            reason, file=self.file, field=field, offset=self.position if offset is None else offset
        )

    def check_count(self, field: str, count: int, offset: int, smallest: int, most: int) -> None:
        left = self.size - self.position
        if count > left // smallest:
            self.fail(f"announces {count} entries, but only {left} bytes are left", field, offset)
        if count > most:
            self.fail(f"announces {count} entries; at most {most} are read", field, offset)

    def read(self, fmt: struct.Struct, field: str) -> Any:
        if self.position + fmt.size > self.size:
            self.fail("the file ends here", field)
        (value,) = fmt.unpack_from(self.buffer, self.position)
        self.position += fmt.size
        return value

    def read_string(self, field: str) -> str:
        offset = self.position
        length = self.read(_U64, field)
        if length > self.size - self.position:
            left = self.size - self.position
            self.fail(f"string of {length} bytes, but only {left} are left", field, offset)
        start, self.position = self.position, self.position + length
        try:
            return str(self.buffer[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"text is not UTF-8 ({error.reason})", field, start + error.start)

    def read_pair(self, field: str) -> None:
        offset = self.position
        key = self.read_string(field)
        if not key:
            self.fail("empty key", field, offset)
        if key in self.metadata:
            self.fail("key occurs twice", key, offset)
        value_type = self.read(_U32, key)
        if value_type == STRING:
            value = self.read_string(key)
        elif value_type == ARRAY:
            value = self.read_array(key)
        else:
            value = self.read_numbers(key, value_type, 1).item()
        self.metadata[key] = value
        self.value_types[key] = value_type
        self.offsets[key] = offset

    def read_array(self, key: str) -> list[str] | np.ndarray:
        item_type = self.read(_U32, key)
        offset = self.position
        count = self.read(_U64, key)
        if item_type == STRING:
            self.check_count(key, count, offset, _U64.size, _MOST_STRINGS)
            return self.read_strings(key, count)
        if item_type == ARRAY:
            self.fail("array of arrays; none is defined for models", key, offset - 4)
        return self.read_numbers(key, item_type, count)

    def read_numbers(self, key: str, value_type: int, count: int) -> np.ndarray:
        if value_type not in SCALARS:
            self.fail(f"unknown value type {value_type}", key, self.position - 4)
        dtype = np.dtype(SCALARS[value_type]).newbyteorder("<")
        left = self.size - self.position
        if count > left // dtype.itemsize:
            self.fail(f"{count} values of {dtype.itemsize} bytes, but only {left} are left", key)
        start, self.position = self.position, self.position + count * dtype.itemsize
        data = self.buffer[start : self.position]  # a copy: metadata outlives the mapping
        if dtype == np.bool_ and data.strip(b"\0\1"):
            self.fail("a truth value is neither 0 nor 1", key, start)
        return np.frombuffer(data, dtype)

    def read_strings(self, key: str, count: int) -> list[str]:
        # A vocabulary has up to 262,144 entries, and they stand before the first token: inlined.
        buffer, size, unpack = self.buffer, self.size, _U64.unpack_from
        end = self.position
        items: list[str] = []
        try:
            for _ in range(count):
                start = end + 8
                end = start + unpack(buffer, end)[0]
                if end > size:
                    break
                items.append(str(buffer[start:end], "utf-8"))
        except (struct.error, UnicodeDecodeError):
            pass
        if len(items) < count:  # read the faulty one again, for its message
            self.position = start - 8
            self.read_string(f"{key}[{len(items)}]")
        self.position = end
        return items

    def read_tensors(self, count: int) -> None:
        alignment = self.alignment()
        found: dict[str, tuple[TensorRecord, int]] = {}
        expected = 0
        for index in range(count):
            at = self.position
            name = self.read_string(f"tensor {index}")
            if not name:
                self.fail("tensor without a name", f"tensor {index}", at)
            if name in found:
                self.fail("tensor occurs twice", name, at)
            record = self.read_tensor(name)
            if record.offset != expected:
                self.fail(
                    f"data offset {record.offset} should be {expected}, "
                    "the padded end of the tensor before it",
                    name,
                    self.position - 8,
                )
            expected += -(-record.nbytes // alignment) * alignment
            found[name] = record, self.position - 8
        data_start = -(-self.position // alignment) * alignment
        for name, (record, at) in found.items():
            end = data_start + record.offset + record.nbytes
            if end > self.size:
                self.fail(
                    f"data ends at byte {end}, past the end of the file ({self.size})", name, at
                )
            self.tensors[name] = replace(record, offset=data_start + record.offset)

    def read_tensor(self, name: str) -> TensorRecord:
        """Reads one entry of the table; its offset still counts from the start of the data."""
        rank = self.read(_U32, name)
        if not 1 <= rank <= _MOST_DIMENSIONS:
            self.fail(
                f"{rank} dimensions; 1 to {_MOST_DIMENSIONS} are possible", name, self.position - 4
            )
        elements = 1
        shape: list[int] = []
        for _ in range(rank):
            size = self.read(_U64, name)
            elements *= size
            if not 0 < elements < 1 << 63:
                self.fail(
                    f"dimension {len(shape)} is {size}, which makes {elements} elements in all",
                    name,
                    self.position - 8,
                )
            shape.append(size)
        type_id = self.read(_U32, name)
        if type_id not in TYPES:
            self.fail(f"unknown tensor type {type_id}", name, self.position - 4)
        qtype, block, block_bytes = TYPES[type_id]
        if shape[0] % block:
            self.fail(
                f"rows of {shape[0]} elements are not whole {qtype} blocks of {block}",
                name,
                self.position - 4,
            )
        nbytes = elements // block * block_bytes
        if nbytes > self.size:
            self.fail(f"{nbytes} bytes of data in a file of {self.size}", name, self.position - 4)
        return TensorRecord(
            name, qtype, tuple(reversed(shape)), self.file, self.read(_U64, name), nbytes
        )

    def alignment(self) -> int:
        key = "general.alignment"
        if key not in self.metadata:
            return 32
        value = self.metadata[key]
        if self.value_types[key] != _U32_TYPE:
            self.fail(
                f"is of value type {self.value_types[key]}, not uint32", key, self.offsets[key]
            )
        if not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
            self.fail(
                f"is {value}; powers of two up to {_LARGEST_ALIGNMENT} are possible",
                key,
                self.offsets[key],
            )
        return value


def _split_count(header: _Header) -> int:
    key = "split.count"
    if key not in header.metadata:
        return 1
    if header.value_types[key] not in (_U16_TYPE, _U32_TYPE):
        header.fail("is not a uint16", key, header.offsets[key])
    return header.metadata[key]


def _split_paths(header: _Header, count: int) -> list[Path]:
    path = Path(header.file)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        header.fail(
            f"one of {count} parts, so the name must end in -00001-of-{count:05}.gguf",
            "split.count",
            header.offsets["split.count"],
        )
    paths = [
        path.with_name(f"{match['stem']}-{n:05}-of-{match['count']}.gguf")
        for n in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        header.fail(
            f"{len(missing)} of {count} parts are missing beside it: {shown}",
            "split.count",
            header.offsets["split.count"],
        )
    return paths


def _check_split(parts: list[_Header]) -> None:
    for number, part in enumerate(parts):
        for key, expected in (("split.count", len(parts)), ("split.no", number)):
            if part.metadata.get(key) != expected:
                raise CheckpointError(
                    f"is {part.metadata.get(key)!r} where the file name says {expected}",
                    file=part.file,
                    field=key,
                    offset=part.offsets.get(key),
                )
    announced = parts[0].metadata.get("split.tensors.count")
    total = sum(len(part.tensors) for part in parts)
    if announced is not None and announced != total:
        parts[0].fail(
            f"is {announced}, but the parts hold {total} tensors",
            "split.tensors.count",
            parts[0].offsets["split.tensors.count"],
        )
