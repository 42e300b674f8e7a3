"""Reads safetensors: one file, or a folder whose files an index lists.

The layout is that of github.com/huggingface/safetensors: 8 bytes of header length, a JSON header,
then the data. All that the reference implementation demands is checked here (and duplicate keys,
which it lets pass), while the data is viewed in place with every element type, the 8-bit floats
included.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from qjax.checkpoint.mapped import TensorFiles, TensorRecord, close_maps, map_file
from qjax.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 32

# Name in the header -> bits an element.
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsFiles(TensorFiles):
    """An open safetensors file, or all files of a folder.

    Attributes:
      metadata: the "__metadata__" texts of all files together.
      tensors: name -> TensorRecord; the qtype is the header's dtype in lower case ("bf16",
        "f8_e4m3").
    """


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFiles:
    """Opens a safetensors file, or a folder of them, without reading the tensors.

    Of a folder, the files that "model.safetensors.index.json" lists are opened, else
    "model.safetensors", else the only file of that kind.

    Raises:
      CheckpointError: a file is damaged, cut short, contradicts itself or the index, or is missing.
    """
    path = Path(path)
    if path.is_dir():
        files, listed = _files_of_folder(path)
    else:
        files, listed = [path], {}
    maps: dict[str, mmap.mmap] = {}
    tensors: dict[str, TensorRecord] = {}
    metadata: dict[str, Any] = {}
    try:
        for file in files:
            records, texts = _read_header(file, maps)
            metadata |= texts
            for record in records:
                if record.name in tensors:
                    raise CheckpointError(
                        f"tensor is also in {tensors[record.name].file}",
                        file=file,
                        field=record.name,
                    )
                tensors[record.name] = record
        for name, file in listed.items():
            if name not in tensors or tensors[name].file != os.fspath(file):
                raise CheckpointError(
                    f"the index says that it is in {file.name}, which does not hold it",
                    file=path / INDEX_NAME,
                    field=name,
                )
    except BaseException:
        close_maps(maps.values())
        raise
    return SafetensorsFiles(path, maps, tensors, metadata)


def _files_of_folder(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files to open, and tensor name -> file where an index says so."""
    index = folder / INDEX_NAME
    if index.exists():
        listed = read_index(index)
        return sorted(set(listed.values())), listed
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME], {}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(
            f"has neither {INDEX_NAME} nor {SINGLE_NAME}, "
            + (f"and several files: {names}" if found else "nor any other .safetensors file"),
            file=folder,
        )
    return found, {}


def read_index(index: Path) -> dict[str, Path]:
    """The files that an index lists, by the names of their tensors."""
    with map_file(index, 2) as mapped:
        if len(mapped) > _LARGEST_HEADER:
            raise CheckpointError(f"is larger than {_LARGEST_HEADER} bytes", file=index)
        content = parse_json(bytes(mapped), index, "index", 0)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "is not a map of tensor names to files", file=index, field="weight_map"
        )
    listed: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not stays_inside(file):
            raise CheckpointError(
                f"names the file {str(file)[:80]!r}, which may lie outside the folder; only files "
                "inside the folder are opened",
                file=index,
                field=name,
            )
        listed[name] = index.parent / file
    return listed


def stays_inside(file: str) -> bool:
    """Whether a name in an index is that of a file inside the folder."""
    # Judged by the rules of both systems, so that an index means the same everywhere.
    return (
        bool(file)
        and "\0" not in file
        and all(
            not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts
            for path in (PurePosixPath(file), PureWindowsPath(file))
        )
    )


def parse_json(data: bytes, file: Path, field: str, start: int) -> dict[str, Any]:
    """Parses a JSON object, strictly: no key twice, no NaN. `start` is where `data` lies."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError("key occurs twice", file=file, field=key, offset=start)
                seen.add(key)
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "text is not UTF-8", file=file, field=field, offset=start + error.start
        ) from error
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", 0)
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"is not valid JSON: {reason}", file=file, field=field, offset=start + at
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", file=file, field=field, offset=start)
    return content


def _read_header(
    file: Path, maps: dict[str, mmap.mmap]
) -> tuple[list[TensorRecord], dict[str, str]]:
    mapped = maps[os.fspath(file)] = map_file(file, _LENGTH.size + 2)
    (length,) = _LENGTH.unpack_from(mapped, 0)
    start = _LENGTH.size + length
    if length > _LARGEST_HEADER:
        raise CheckpointError(
            f"header of {length} bytes; at most {_LARGEST_HEADER} are read",
            file=file,
            field="header length",
            offset=0,
        )
    if start > len(mapped):
        raise CheckpointError(
            f"header of {length} bytes in a file of {len(mapped)}: cut short, or not safetensors",
            file=file,
            field="header length",
            offset=0,
        )
    data = mapped[_LENGTH.size : start]
    if not data.startswith(b"{"):
        raise CheckpointError(
            f"starts with {data[:1]!r}, not '{{'", file=file, field="header", offset=_LENGTH.size
        )
    header = parse_json(data, file, "header", _LENGTH.size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            "is not a map of texts to texts",
            file=file,
            field="__metadata__",
            offset=_LENGTH.size,
        )
    records = [_read_entry(name, entry, file, start) for name, entry in header.items()]
    _check_contiguous(records, file, start, len(mapped))
    return records, metadata


def _read_entry(name: str, entry: Any, file: Path, start: int) -> TensorRecord:
    """One tensor of the header; `start` is where the data begins."""

    def fail(reason: str) -> CheckpointError:
        return CheckpointError(reason, file=file, field=name, offset=_LENGTH.size)

    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise fail(f"entry is {str(entry)[:80]}; it must have {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise fail(f"unknown dtype {str(dtype)[:40]!r}; known are {', '.join(sorted(_BITS))}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(map(_is_size, shape))
    ):
        raise fail(f"shape is {str(shape)[:80]}, not a list of at most {_MOST_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail(f"data_offsets are {str(offsets)[:80]}, not two positions")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise fail(f"shape {shape} of {dtype} takes {bits} bits, data_offsets {end - begin} bytes")
    return TensorRecord(
        name, dtype.lower(), tuple(shape), os.fspath(file), start + begin, end - begin
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_contiguous(records: list[TensorRecord], file: Path, start: int, size: int) -> None:
    expected = start
    for record in sorted(records, key=lambda r: (r.offset, r.nbytes)):
        if record.offset != expected:
            what = "a hole" if record.offset > expected else "an overlap"
            raise CheckpointError(
                f"{what}: begins at byte {record.offset - start} of the data, "
                f"what lies before it ends at {expected - start}",
                file=file,
                field=record.name,
                offset=record.offset,
            )
        expected += record.nbytes
    if expected != size:
        what = "cut short" if expected > size else "followed by something else"
        raise CheckpointError(
            f"data ends at byte {expected}, the file at {size}: it is {what}",
            file=file,
            field="data_offsets",
            offset=min(expected, size),
        )
