"""TorchAO: tensor subclasses flattened into safetensors.

Each quantized weight is a handful of tensors (`_weight_qdata`, `_weight_scale` ...), and a JSON
text in the file's header that names its class with the settings. The texts of the header decide;
the configuration in config.json says how the model was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pallas_kernels import codes
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import weights
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Record,
    Stored,
    expect,
    fault,
)
from qjax.lazy import LazyArray, as_bytes
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config

_QDATA = "_weight_qdata"
_ZERO = "_weight_zero_point"
_SCALES = (*PLAIN, "f8_e4m3", "f8_e8m0", "u8")
Shape = tuple[int, int]


@register_quantization_config("torchao")
@dataclass(frozen=True)
class TorchAO(QuantizationConfig):
    """A checkpoint, the texts of its headers, and its configuration as it was read."""

    metadata: Mapping[str, Any]
    file: str
    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert")
        keys.ignore("include_input_output_embeddings", "untie_embedding_weights")
        keys.done()
        return cls(checkpoint.metadata, checkpoint.file, config)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if _QDATA not in stored:
            return None
        if len(shape) != 2:
            raise UnsupportedError(f"{self.file}, {module}: stacked experts are not supported")
        record = stored[_QDATA]
        kind, data = self._description(record)
        if kind not in _CLASSES:
            raise UnsupportedError(
                f"{record.file}, {module}: a tensor of class {kind!r:.80} is not supported; these "
                f"are: {', '.join(_CLASSES)}"
            )
        make, size = _CLASSES[kind], (shape[0], shape[1])
        if data.get("is_swizzled_scales"):
            layer = _unswizzled(make, module, stored, size, data)
        else:
            layer = make(module, stored, size, data)
        return replace(layer, decode=_rounded(layer.decode, data))

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        """Writes what was loaded: the texts that describe the weights are those of its header."""
        text = self.metadata.get(f"{module}.weight")
        kind = json.loads(text)["_type"] if isinstance(text, str) else None
        if kind not in _WRITTEN or weight.aux or weight.additive or weight.qvalue.ndim != 2:
            raise UnsupportedError(
                f"{module}: of TorchAO's classes qjax writes {', '.join(_WRITTEN)}, where a "
                f"checkpoint of TorchAO was loaded; this is {kind or weight.qtype!r:.80}"
            )
        return _WRITTEN[kind](module, weight)

    def _description(self, record: Record) -> tuple[str, Mapping[str, Any]]:
        """Class name and settings of a weight, as the header tells."""
        name = record.name.removesuffix(_QDATA) + "weight"
        try:
            text = json.loads(self.metadata[name])
            kind, data = text["_type"], text.get("_data", {})
            if not isinstance(kind, str) or not isinstance(data, dict):
                raise TypeError("not a class with settings")
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"the header does not describe it: {error!r:.80}", file=record.file, field=name
            ) from error
        return kind, data


def _rounded(
    decode: Callable[[Arrays], QArray], data: Mapping[str, Any]
) -> Callable[[Arrays], QArray]:
    """`dequantize` of a class that has a dtype ends with a rounding to it."""
    dtype = _torch_name(data.get("dtype", data.get("orig_dtype")))
    if dtype not in ("bfloat16", "float16"):
        return decode
    return lambda arrays: replace(decode(arrays), rounded=dtype)


def _group(record: Record, data: Mapping[str, Any], shape: Shape) -> tuple[int, int]:
    block = data.get("block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise fault(record, f"has block_size {block!r:.80} in the header")
    return min(block[0], shape[0]), min(block[1], shape[1])


def _sizes(shape: Shape, group: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes that scales of these groups may be stored in."""
    grid = weights.grid(shape, group)
    flat = (int(np.prod(grid)),)
    return [grid, flat, ()] if grid == (1, 1) else [grid, flat] if 1 in grid else [grid]


def _zero(module: str, stored: Stored, shape: Shape, group: tuple[int, int]) -> tuple[str, ...]:
    if _ZERO not in stored:
        return ()
    expect(module, stored, _ZERO, ("i8", "u8", "i32", "i64", *PLAIN), *_sizes(shape, group))
    return (_ZERO,)


def _intx(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    """Few bits in a byte each, signed; they are packed in memory."""
    record = expect(module, stored, _QDATA, "i8", shape)
    target = _torch_name(data.get("target_dtype"))
    bits = int(target[3:]) if target[:3] == "int" and target[3:].isdigit() else 0
    if bits not in range(1, 9):
        raise UnsupportedError(f"{record.file}, {module}: target_dtype {target!r:.80}")
    group = _group(record, data, shape)
    expect(module, stored, "_weight_scale", PLAIN, *_sizes(shape, group))
    zeros = _zero(module, stored, shape, group)
    kinds = {
        None: None,
        "int8_asym_per_token": ActSpec("int8", "token", True, symmetric=False),
        "int8_sym_per_token": ActSpec("int8", "token", True, divisor=127.5),
    }
    quantization = data.get("activation_quantization")
    quantization = _torch_name(quantization) if isinstance(quantization, dict) else quantization
    if quantization not in kinds:
        raise UnsupportedError(
            f"{record.file}, {module}: activation_quantization {quantization!r:.80}"
        )
    act = kinds[quantization]

    def decode(arrays: Arrays) -> QArray:
        zero = weights.zero_points(arrays.get(_ZERO), shape, group)
        packed, qtype, zero = weights.signed_bytes(record, arrays[_QDATA], bits, zero)
        if qtype == "uint1b1":  # no such type: it comes with zero points
            qtype, zero = "uint1", np.ones(weights.grid(shape, group), np.uint8)
        scale = arrays["_weight_scale"]
        return weights.coded(packed, qtype, shape, scale, group, zero_point=zero, act=act)

    return Layer((_QDATA, "_weight_scale", *zeros), decode)


def _int8(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    record = expect(module, stored, _QDATA, "i8", shape)
    group = _group(record, data, shape)
    expect(module, stored, "_weight_scale", PLAIN, *_sizes(shape, group))
    zeros = _zero(module, stored, shape, group)
    act = _act(record, data, "int8")
    extra = _pre_scale(module, stored, shape)

    def decode(arrays: Arrays) -> QArray:
        zero = weights.zero_points(arrays.get(_ZERO), shape, group)
        scale = arrays["_weight_scale"]
        return weights.coded(arrays[_QDATA], "int8", shape, scale, group, zero_point=zero, act=act)

    return Layer((_QDATA, "_weight_scale", *zeros, *extra), _with_pre_scale(decode, extra, shape))


def _float8(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    record = expect(module, stored, _QDATA, tuple(weights.FP8_QTYPES), shape)
    group = _group(record, data, shape)
    expect(module, stored, "_weight_scale", PLAIN, *_sizes(shape, group))
    qtype = weights.FP8_QTYPES[record.qtype]
    act = _act(record, data, "fp8_e4m3")
    extra = _pre_scale(module, stored, shape)

    def decode(arrays: Arrays) -> QArray:
        scale = arrays["_weight_scale"]
        return weights.coded(arrays[_QDATA], qtype, shape, scale, group, act=act)

    return Layer((_QDATA, "_weight_scale", *extra), _with_pre_scale(decode, extra, shape))


def _int4(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    """Two signed values a byte, the even column low; scales and zeros [K / g, N], added."""
    n, k = shape
    record = expect(module, stored, _QDATA, ("u8", "i8"), (n, k // 2))
    group = _group(record, data, shape)
    grid = weights.grid(shape, group)
    for suffix in ("_weight_scale", "_weight_zero_point"):
        expect(module, stored, suffix, PLAIN, (grid[1], n))
    act = _act(record, data, "fp8_e4m3")
    extra = _pre_scale(module, stored, shape)

    def decode(arrays: Arrays) -> QArray:
        raw = as_bytes(arrays[_QDATA])
        packed = weights.bytewise(raw, lambda some: some ^ np.uint8(0x88))
        scale = LazyArray.of(arrays["_weight_scale"].T)
        zero = np.ascontiguousarray(arrays["_weight_zero_point"].T)
        return _added(packed, shape, scale, zero, group, act)

    reads = (_QDATA, "_weight_scale", "_weight_zero_point", *extra)
    return Layer(reads, _with_pre_scale(decode, extra, shape))


def _added(
    packed: LazyArray,
    shape: Shape,
    scale: Any,
    zero: np.ndarray,
    group: tuple[int, int],
    act: ActSpec | None = None,
) -> QArray:
    """W = (code - 8) * scale + zero."""
    some = bool(zero.any())
    return weights.coded(
        packed,
        "uint4b8",
        shape,
        scale,
        group,
        zero_point=zero if some else None,
        additive=some,
        act=act,
    )


def _tile_packed(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    """Tiles of tinygemm: lane t of 32 holds row t / 4 of 8, word i of 4 eight columns."""
    n, k = shape
    record = stored[_QDATA]
    padded = record.shape[1] * 128 if len(record.shape) == 4 else 0
    expect(module, stored, _QDATA, "i32", (-(-n // 8), padded // 128, 32, 4))
    if padded < k:
        raise fault(record, f"has shape {record.shape}, too few columns for {shape}")
    group = _group(record, data, (n, padded))
    groups = -(-padded // group[1])
    expect(module, stored, "_weight_scale_and_zero", PLAIN, (groups, record.shape[0] * 8, 2))
    kept = -(-k // group[1])

    def untiled(words: np.ndarray) -> np.ndarray:
        """Tiles [rows / 8, columns / 128, 32, 4] as uint8 [rows, columns]."""
        words = np.ascontiguousarray(words).view(np.uint32)
        nibbles = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32) * np.uint32(4)
        parts = ((words[..., None] >> nibbles) & np.uint32(15)).astype(np.uint8)
        lane, word, value = np.meshgrid(np.arange(32), np.arange(4), np.arange(8), indexing="ij")
        column = 32 * word + np.array([0, 1, 8, 9, 16, 17, 24, 25])[value] + 2 * (lane % 4)
        tiles = np.empty((*words.shape[:2], 8, 128), np.uint8)
        tiles[:, :, lane // 4, column] = parts
        return tiles.transpose(0, 2, 1, 3).reshape(8 * words.shape[0], -1)

    def decode(arrays: Arrays) -> QArray:
        def values(rows: slice, columns: slice) -> np.ndarray:
            here = slice(rows.start // 8, -(-rows.stop // 8))
            there = slice(columns.start // 128, -(-columns.stop // 128))
            size = rows.stop - rows.start, columns.stop - columns.start
            return untiled(arrays[_QDATA][here, there])[: size[0], : size[1]]

        packed = weights.repacked((n, k), 4, values, rows=8, columns=128)
        pairs = arrays["_weight_scale_and_zero"][:kept, :n]
        scale, zero = (np.ascontiguousarray(pairs[..., i].T) for i in (0, 1))
        return _added(packed, shape, scale, zero, (1, group[1]))

    return Layer((_QDATA, "_weight_scale_and_zero"), decode)


def _nvfp4(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    n, k = shape
    record = expect(module, stored, _QDATA, "u8", (n, k // 2))
    size = _block(record, data, 16)
    weights.require_divisible(record, k, size)
    expect(module, stored, "_weight_scale", "f8_e4m3", (n, k // size))
    known = {"_weight_per_tensor_scale": "global_scale"}
    act = _nvfp4_act(record, data, size)
    if act is not None:
        known["_weight_act_per_tensor_scale"] = "act_global_scale"
    whole = {suffix: key for suffix, key in known.items() if suffix in stored}
    for suffix in whole:
        expect(module, stored, suffix, PLAIN, (), (1,), (1, 1))

    def decode(arrays: Arrays) -> QArray:
        # Without a scale of the whole, those of groups are what they are.
        aux = {} if act is None else {"act_global_scale": np.ones((1, 1), np.float32)}
        aux |= {key: weights.scalar(arrays[suffix]) for suffix, key in whole.items()}
        scale = arrays["_weight_scale"]
        return weights.coded(arrays[_QDATA], "fp4_e2m1", shape, scale, (1, size), aux=aux, act=act)

    return Layer((_QDATA, "_weight_scale", *whole), decode)


def _nvfp4_act(record: Record, data: Mapping[str, Any], size: int) -> ActSpec | None:
    kwargs = _act_settings(record, data)
    if kwargs is None:
        return None
    if kwargs.get("use_dynamic_per_tensor_scale"):
        raise UnsupportedError(
            f"{record.file}, {record.name}: activations with a scale of the whole that is computed "
            "as they come (use_dynamic_per_tensor_scale) are not supported"
        )
    return ActSpec("fp4_e2m1", "group", True, group_size=size, scale="fp8_e4m3")


_MX_TYPES = {
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "float4_e2m1fn_x2": "fp4_e2m1",
}
_MX_SCALES = {"FLOOR": "e8m0", "RCEIL": "e8m0_ceil", "EVEN": "e8m0_even"}


def _mx(module: str, stored: Stored, shape: Shape, data: Mapping[str, Any]) -> Layer:
    record = stored[_QDATA]
    element, size = _torch_name(data.get("elem_dtype")), _block(record, data, 32)
    if element not in _MX_TYPES:
        raise UnsupportedError(f"{record.file}, {module}: elem_dtype {element!r:.80}")
    act = _mx_act(record, data)
    layer = weights.mx(module, stored, shape, _MX_TYPES[element], size, _QDATA, "_weight_scale")
    return replace(layer, decode=lambda arrays: replace(layer.decode(arrays), act=act))


def _mx_act(record: Record, data: Mapping[str, Any]) -> ActSpec | None:
    kwargs = _act_settings(record, data)
    if kwargs is None:
        return None
    element = _torch_name(kwargs.get("elem_dtype"))
    mode = _torch_name(kwargs.get("scaling_mode")).upper()
    if element not in _MX_TYPES or mode not in _MX_SCALES:
        raise UnsupportedError(
            f"{record.file}, {record.name}: activations in {element} with scaling_mode {mode} are "
            f"not supported; {', '.join(_MX_TYPES)} and {', '.join(_MX_SCALES)} are"
        )
    size = _block(record, kwargs, 32)
    return ActSpec(_MX_TYPES[element], "group", True, group_size=size, scale=_MX_SCALES[mode])


def _block(record: Record, data: Mapping[str, Any], default: int) -> int:
    size = data.get("block_size", default)
    if type(size) is not int or size < 1:
        raise fault(record, f"has block_size {size!r:.80} in the header")
    return size


def _unswizzled(
    make: Callable[[str, Stored, Shape, Mapping[str, Any]], Layer],
    module: str,
    stored: Stored,
    shape: Shape,
    data: Mapping[str, Any],
) -> Layer:
    """A layer whose scales lie as NVIDIA's tensor cores take them: in tiles of 128 rows and 4
    columns, of which rows 32 apart are neighbours (cuBLAS, "1D block scaling factors layout").
    """
    record = expect(module, stored, "_weight_scale", _SCALES)
    n, columns = shape[0], shape[1] // _block(record, data, 16)
    tiles = -(-n // 128), -(-columns // 4)
    expect(
        module,
        stored,
        "_weight_scale",
        _SCALES,
        (32 * tiles[0], 16 * tiles[1]),
        (512 * tiles[0] * tiles[1],),
    )
    rows = replace(record, shape=(n, columns))  # type: ignore[type-var]
    layer = make(module, {**stored, "_weight_scale": rows}, shape, data)

    def decode(arrays: Arrays) -> QArray:
        tiled = arrays["_weight_scale"].reshape(*tiles, 32, 4, 4)
        rows = tiled.transpose(0, 3, 2, 1, 4).reshape(128 * tiles[0], 4 * tiles[1])
        return layer.decode({**arrays, "_weight_scale": np.ascontiguousarray(rows[:n, :columns])})

    return replace(layer, decode=decode)


_CLASSES: dict[str, Callable[[str, Stored, Shape, Mapping[str, Any]], Layer]] = {
    "IntxUnpackedToInt8Tensor": _intx,
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tile_packed,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
}


def _bytes_of(module: str, weight: QArray) -> dict[str, np.ndarray]:
    """Signed codes, one in a byte, with zero points."""
    code, k = codes.CODES[weight.qtype], weight.shape[1]
    raw, zero = np.asarray(weight.qvalue), np.zeros(np.shape(weight.scale), np.int8)
    if code.kind not in ("int", "uint"):
        raise UnsupportedError(f"{module}: TorchAO has no integers for {weight.qtype}")
    half = 0 if code.kind == "int" else 1 << (code.bits - 1)
    values = codes.unpack(raw, code.bits, k, np).view(np.int8) - np.int8(half)
    if weight.zero_point is not None:
        zero = (np.asarray(weight.zero_point).astype(np.int32) - half).astype(np.int8)
    return {_QDATA: values, "_weight_scale": np.asarray(weight.scale), _ZERO: zero}


def _floats_of(module: str, weight: QArray) -> dict[str, np.ndarray]:
    if weight.qtype not in weights.FP8_DTYPES:
        raise UnsupportedError(f"{module}: TorchAO has no 8-bit floats for {weight.qtype}")
    values = np.asarray(weight.qvalue).view(weights.FP8_DTYPES[weight.qtype])
    return {_QDATA: values, "_weight_scale": np.asarray(weight.scale)}


_WRITTEN: dict[str, Callable[[str, QArray], dict[str, np.ndarray]]] = {
    "IntxUnpackedToInt8Tensor": _bytes_of,
    "Int8Tensor": _bytes_of,
    "Float8Tensor": _floats_of,
}


def _torch_name(entry: Any) -> str:
    """The value of an enum or torch dtype of the header's JSON, without the module's name."""
    value = entry.get("_data") if isinstance(entry, dict) else entry
    return str(value).removeprefix("torch.")


def _act_settings(record: Record, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of `act_quant_kwargs`; None where activations stay as they are."""
    kwargs = data.get("act_quant_kwargs")
    if kwargs is None:
        return None
    inner = kwargs.get("_data") if isinstance(kwargs, dict) else None
    if not isinstance(inner, dict):
        raise fault(record, f"has act_quant_kwargs {kwargs!r:.80} in the header")
    return inner


def _act(record: Record, data: Mapping[str, Any], dtype: str) -> ActSpec | None:
    """What `act_quant_kwargs` of a tensor means."""
    inner = _act_settings(record, data)
    if inner is None:
        return None
    granularity = inner.get("granularity")
    kind = granularity.get("_type") if isinstance(granularity, dict) else None
    strategies = {"PerRow": "token", "PerTensor": "tensor", "PerToken": "token"}
    if kind not in strategies or inner.get("reduce_range"):
        raise UnsupportedError(f"{record.file}, {record.name}: activations of {inner!r:.200}")
    symmetric = _torch_name(inner.get("mapping_type", "SYMMETRIC")) == "SYMMETRIC"
    # choose_qparams_affine of TorchAO divides by half the number of codes.
    divisor = 127.5 if dtype == "int8" and symmetric else None
    return ActSpec(dtype, strategies[kind], True, symmetric=symmetric, divisor=divisor)


def _pre_scale(module: str, stored: Stored, shape: Shape) -> tuple[str, ...]:
    name = "_weight_act_pre_scale"
    if name not in stored:
        return ()
    expect(module, stored, name, PLAIN, (shape[1],), (1, shape[1]))
    return (name,)


def _with_pre_scale(
    decode: Callable[[Arrays], QArray], names: tuple[str, ...], shape: Shape
) -> Callable[[Arrays], QArray]:
    """The weight with what multiplies its inputs (AWQ, SmoothQuant)."""
    if not names:
        return decode

    def decode_with(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        scale = arrays[names[0]].reshape(1, shape[1])
        return replace(weight, aux={**weight.aux, "act_pre_scale": scale})

    return decode_with
