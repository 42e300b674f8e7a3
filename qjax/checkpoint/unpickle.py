"""Reads `pytorch_model.bin`: tensors that torch.save has pickled, and TorchAO's tensor subclasses.

A file is a zip archive that nothing compresses: `data.pkl` with the structure, `data/N` with the
bytes of each storage (github.com/pytorch/pytorch, torch/serialization.py). The pickle is walked by
a machine of its own that knows the few opcodes torch writes and never imports or calls what the
pickle names: a name means one of the constructions below, or it is an error. Tensors stay in the
mapped file. A subclass comes out as its safetensors files have it: `_weight_qdata` and so on, and a
JSON text of the class and its settings.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qjax.checkpoint.mapped import TensorFiles, TensorRecord, close_maps, map_file
from qjax.checkpoint.safetensors_io import read_index
from qjax.errors import CheckpointError, UnsupportedError

SINGLE_NAME = "pytorch_model.bin"
INDEX_NAME = "pytorch_model.bin.index.json"

_LARGEST_PICKLE = 1 << 25
_MOST_OPCODES = 3_000_000
_MOST_DIMENSIONS = 32
_MOST_SETTINGS = 1000

# torch.dtype -> element type as safetensors call it, and its bytes.
_DTYPES = {
    "float64": ("f64", 8),
    "float32": ("f32", 4),
    "float16": ("f16", 2),
    "bfloat16": ("bf16", 2),
    "float8_e4m3fn": ("f8_e4m3", 1),
    "float8_e5m2": ("f8_e5m2", 1),
    "float8_e8m0fnu": ("f8_e8m0", 1),
    "float4_e2m1fn_x2": ("u8", 1),
    "int64": ("i64", 8),
    "int32": ("i32", 4),
    "int16": ("i16", 2),
    "int8": ("i8", 1),
    "uint8": ("u8", 1),
    "uint16": ("u16", 2),
    "uint32": ("u32", 4),
    "uint64": ("u64", 8),
    "bool": ("bool", 1),
} | {f"{sign}int{bits}": ("", 0) for sign in ("", "u") for bits in range(1, 8)}  # only as settings

# Storage classes of old, and of today (bytes of no type).
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# Enums are pickled by value; the settings of safetensors files have their names.
_ENUMS = {"MappingType": {1: "SYMMETRIC", 2: "ASYMMETRIC", 3: "SYMMETRIC_NO_CLIPPING_ERR"}}


@dataclass(frozen=True)
class _Global:
    """A name in the pickle, looked up nowhere."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Storage:
    """Bytes of one file of the archive; `dtype` of torch is what a tensor of it has by default."""

    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, offset and strides in elements."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _Object:
    """An instance of one of TorchAO's classes: its name, and what was pickled of it."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)
    value: Any = None


class PickledFiles(TensorFiles):
    """Open pickled files; `metadata` are the texts that describe tensors of subclasses."""


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds files of this kind."""
    return (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file()


def open_pickled(folder: Path) -> PickledFiles:
    """Opens the files of a folder without reading the tensors.

    Raises:
      CheckpointError: a file is damaged, or its pickle holds anything but tensors and settings.
      UnsupportedError: a tensor is of a type or in an order that is not read.
    """
    maps: dict[str, mmap.mmap] = {}
    tensors: dict[str, TensorRecord] = {}
    metadata: dict[str, Any] = {}
    try:
        for file in _files_of_folder(folder):
            for name, value in _read_file(file, maps).items():
                for record in _records(file, name, value, metadata):
                    if record.name in tensors:
                        raise CheckpointError(
                            f"is also in {tensors[record.name].file}", file=file, field=record.name
                        )
                    tensors[record.name] = record
    except BaseException:
        close_maps(maps.values())
        raise
    return PickledFiles(folder, maps, tensors, metadata)


def _files_of_folder(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / SINGLE_NAME]
    return sorted(set(read_index(index).values()))


@dataclass(frozen=True)
class _Found:
    """A value of the state dict, and where the storages of its file lie: key -> (first byte,
    bytes)."""

    value: _Tensor | _Object
    places: dict[str, tuple[int, int]]


def _read_file(file: Path, maps: dict[str, mmap.mmap]) -> dict[str, _Found]:
    mapped = maps[os.fspath(file)] = map_file(file, 22)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, OverflowError, NotImplementedError) as error:
        raise CheckpointError(f"is not a file of torch.save: {error}", file=file) from error
    places = {e.filename.partition("/")[2]: _place(file, mapped, e) for e in entries}
    if "data.pkl" not in places:
        raise CheckpointError("holds no data.pkl", file=file)
    if "byteorder" in places and _bytes(mapped, places["byteorder"]) != b"little":
        raise UnsupportedError(f"{file}: its numbers are not little-endian")
    start, size = places["data.pkl"]
    if size > _LARGEST_PICKLE:
        raise CheckpointError(f"is {size} bytes of data.pkl, too many", file=file, offset=start)
    try:
        with warnings.catch_warnings():
            # Of a damaged name, pickletools warns before it is refused here.
            warnings.simplefilter("ignore", DeprecationWarning)
            content = _Machine(file).run(mapped[start : start + size])
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"is no pickle of torch.save: {type(error).__name__} {error!s:.80}",
            file=file,
            field="data.pkl",
            offset=start,
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError("holds no state dict", file=file, field="data.pkl", offset=start)
    for name, value in content.items():
        if not isinstance(value, _Tensor | _Object):
            raise CheckpointError(f"is a {type(value).__name__}, no tensor", file=file, field=name)
    return {name: _Found(value, places) for name, value in content.items()}


def _place(file: Path, mapped: mmap.mmap, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and size of what an entry of the archive holds."""
    at, size = entry.header_offset, entry.file_size
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UnsupportedError(f"{file}, {entry.filename:.80}: compressed or encrypted")
    head = mapped[at : at + 30]
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise CheckpointError("has no header", file=file, field=entry.filename[:80], offset=at)
    start = at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if start + size > len(mapped):
        raise CheckpointError("is cut short", file=file, field=entry.filename[:80], offset=start)
    return start, size


def _bytes(mapped: mmap.mmap, place: tuple[int, int]) -> bytes:
    return mapped[place[0] : place[0] + min(place[1], 64)]


def _records(
    file: Path,
    name: str,
    found: _Found,
    metadata: dict[str, Any],
) -> list[TensorRecord]:
    value = found.value
    if isinstance(value, _Tensor):
        return [_record(file, name, value, found.places)]
    module, _, last = name.rpartition(".")
    inner = {key: part for key, part in value.state.items() if isinstance(part, _Tensor)}
    left = iter(range(_MOST_SETTINGS))
    try:
        settings = {k: _setting(part, left) for k, part in value.state.items() if k not in inner}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its settings: {error}", file=file, field=name) from error
    names = list(inner)
    metadata[name] = json.dumps(
        {"_type": value.kind, "_data": settings, "_tensor_data_names": names}
    )
    prefix = f"{module}._{last}_" if module else f"_{last}_"
    return [_record(file, prefix + key, part, found.places) for key, part in inner.items()]


def _record(
    file: Path, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]
) -> TensorRecord:
    qtype, itemsize = _DTYPES[tensor.dtype]
    if not itemsize:
        raise UnsupportedError(f"{file}, {name}: tensors of torch.{tensor.dtype} are not read")
    start, size = places.get(f"data/{tensor.storage.key}", (0, -1))
    if size < 0:
        raise CheckpointError(
            f"its storage data/{tensor.storage.key:.40} is missing", file=file, field=name
        )
    stride = 1
    for length, step in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        if length != 1 and step != stride:
            raise UnsupportedError(f"{file}, {name}: strides {tensor.stride} are not contiguous")
        stride *= length
    at, nbytes = tensor.offset * itemsize, math.prod(tensor.size) * itemsize
    if at + nbytes > size:
        raise CheckpointError(
            f"takes bytes {at} to {at + nbytes} of a storage of {size}",
            file=file,
            field=name,
            offset=start,
        )
    return TensorRecord(name, qtype, tensor.size, os.fspath(file), start + at, nbytes)


def _setting(value: Any, left: Iterator[int]) -> Any:
    """A setting as the JSON of safetensors headers has it; `left` ends with what is too much."""
    if next(left, None) is None:
        raise ValueError(f"more than {_MOST_SETTINGS}")
    if isinstance(value, _Object):
        if value.value is not None:
            known = _ENUMS.get(value.kind, {})
            return {"_type": value.kind, "_data": known.get(value.value, value.value)}
        return {"_type": value.kind, "_data": _setting(value.state, left)}
    if isinstance(value, _Global):
        return {"_type": "torch.dtype", "_data": value.name}
    if isinstance(value, list | tuple):
        return [_setting(part, left) for part in value]
    if isinstance(value, dict):
        return {key: _setting(part, left) for key, part in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a {type(value).__name__} among them")


class _Machine:
    """Runs a pickle over values that do nothing.

    Keys of dicts are texts: hashing nested tuples could take for ever.
    """

    def __init__(self, file: Path):
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle holds.

        Raises:
          CheckpointError: it names something that is not allowed, or uses another opcode.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_OPCODES:
                raise ValueError(f"more than {_MOST_OPCODES} opcodes")
            if opcode.name == "STOP":
                return self.stack.pop()
            step = _OPCODES.get(opcode.name)
            if step is None:
                raise ValueError(f"opcode {opcode.name}, which torch.save does not write")
            step(self, argument)
        raise ValueError("the pickle does not end")

    def popmark(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or type(key) is not str:
                raise ValueError("a dict whose keys are no texts")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("appends to what is no list")
        self.stack[-1].extend(items)

    def find(self, text: str) -> _Global:
        found = _Global(*text.split(" ", 1))
        plain = found.module == "torch" and (found.name in _DTYPES or found.name in _STORAGES)
        ours = found.module.partition(".")[0] == "torchao" and found.name.isidentifier()
        if not (plain or ours or str(found) in _CALLS or str(found) in _NAMES):
            raise CheckpointError(
                f"the pickle wants {str(found)[:120]!r}; only tensors and TorchAO's settings are "
                "read from one",
                file=self.file,
                field="data.pkl",
            )
        return found

    def persistent(self, identity: Any) -> _Storage:
        kind, storage, key, _, _ = identity
        if kind != "storage" or type(key) is not str or storage.name not in _STORAGES:
            raise ValueError("a persistent object that is no storage")
        return _Storage(_STORAGES[storage.name], key)

    def reduce(self) -> Any:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise ValueError("a call of what is no function")
        if str(function) in _CALLS:
            return _CALLS[str(function)](*arguments)
        if function.module.startswith("torchao.") and len(arguments) == 1:
            if not isinstance(arguments[0], str | int):
                raise ValueError(f"{function} of what is no value of an enum")
            return _Object(function.name, value=arguments[0])
        raise ValueError(f"a call of {function}")

    def new(self) -> _Object:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Global or not kind.module.startswith("torchao.") or arguments:
            raise ValueError("an object that is none of TorchAO's")
        return _Object(kind.name)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict:
            raise ValueError("a state that is no dict")
        if type(target) is _Object:
            target.state.update(state)
        elif type(target) is not dict:  # a state dict's own attributes say nothing of tensors
            raise ValueError("a state of what has none")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
    """`_rebuild_tensor_v2`, and `_v3`, which gives the type of elements after two flags."""
    if type(storage) is not _Storage:
        raise ValueError("a tensor without a storage")
    dtype = storage.dtype
    if len(more) > 2 and type(more[2]) is _Global:
        dtype = more[2].name
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or dtype not in _DTYPES:
        raise ValueError("a tensor with contradicting sizes")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a tensor with sizes out of range")
    return _Tensor(storage, dtype, offset, tuple(size), tuple(stride))


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> _Object:
    """`_rebuild_from_type_v2`: a wrapper, whose tensors are in its state, and the dtype that it has
    to the outside among the arguments.
    """
    if function != _Global("torch._utils", "_rebuild_wrapper_subclass"):
        raise ValueError("a tensor that is rebuilt in another way")
    if type(kind) is not _Global or type(state) is not dict:
        raise ValueError("a tensor subclass without a state")
    dtype = arguments[1] if type(arguments) is tuple and len(arguments) > 1 else None
    return _Object(kind.name, ({"dtype": dtype} if type(dtype) is _Global else {}) | state)


def _empty() -> dict[str, Any]:
    """`OrderedDict()`; the entries follow one by one."""
    return {}


# What may be called, by the name in the pickle; nothing of torch is.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.serialization._get_layout": lambda name: None,
    "torch.device": lambda *_: None,
    "torch.Size": lambda sizes: tuple(sizes),
}
# What may be named besides.
_NAMES = {"torch._utils._rebuild_wrapper_subclass", "torch.storage.UntypedStorage"}


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _put(machine: _Machine, at: int) -> None:
    machine.memo[at] = machine.stack[-1]


def _get(machine: _Machine, at: int) -> None:
    machine.stack.append(machine.memo[at])


def _pop_tuple(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        at = len(machine.stack) - count
        items, machine.stack[at:] = tuple(machine.stack[at:]), []
        if len(items) != count:
            raise IndexError("the stack is empty")
        machine.stack.append(items)

    return step


_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "EMPTY_DICT": lambda m, _: _push(m, {}),
    "EMPTY_LIST": lambda m, _: _push(m, []),
    "EMPTY_TUPLE": lambda m, _: _push(m, ()),
    "NONE": lambda m, _: _push(m, None),
    "NEWTRUE": lambda m, _: _push(m, True),
    "NEWFALSE": lambda m, _: _push(m, False),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"), _push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: _push(m, tuple(m.popmark())),
    "TUPLE1": _pop_tuple(1),
    "TUPLE2": _pop_tuple(2),
    "TUPLE3": _pop_tuple(3),
    "GLOBAL": lambda m, text: _push(m, m.find(text)),
    "BINPERSID": lambda m, _: _push(m, m.persistent(m.stack.pop())),
    "REDUCE": lambda m, _: _push(m, m.reduce()),
    "NEWOBJ": lambda m, _: _push(m, m.new()),
    "BUILD": lambda m, _: m.build(),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.popmark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.popmark()),
}
