"""How AMD Quark lays the tensors of one layer out, and back (`quark.torch.export`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import PLAIN, Arrays, Keys, Layer, Stored, expect
from qjax.lazy import LazyArray
from qjax.qarray import QArray

Shape = tuple[int, ...]
Order = tuple[int, ...]

_MX_TYPES = {
    "fp4": "fp4_e2m1",
    "fp6_e2m3": "fp6_e2m3",
    "fp6_e3m2": "fp6_e3m2",
    "fp8_e4m3": "fp8_e4m3",
}
FLOATS = {"fp8_e5m2": "fp8_e5m2", **_MX_TYPES}
_SMALL = ("int4", "uint4", "int3", "int2", "uint2")
_DTYPES = (
    *("fp8_e4m3", "fp8_e5m2", "int8", "uint8", "int4", "uint4", "int3", "int2", "uint2"),
    *("fp4", "fp6_e2m3", "fp6_e3m2", "bfloat16", "float16", "float32"),
)
_ZEROS = ("i8", "u8", "i32", *PLAIN)
_SAYS_NOTHING = (
    *("observer_cls", "round_method", "scale_type", "zero_point_type", "max_input_numel"),
    *("enable_buffer_reuse", "is_scale_quant", "mx_element_dtype", "is_mixed_dtypes", "axis"),
    *("scale_calculation_mode", "block_axis", "percentile", "use_tensor_scale"),
)


@dataclass(frozen=True)
class TensorConfig:
    """How one tensor of a layer is quantized (QTensorConfig of Quark)."""

    dtype: str
    qscheme: str
    group_size: int | None
    block_size: tuple[int, ...] | None
    symmetric: bool
    is_dynamic: bool
    scale_format: str

    @classmethod
    def read(cls, keys: Keys) -> TensorConfig:
        keys.ignore(*_SAYS_NOTHING)
        keys.get("ch_axis", int)  # shapes of scales tell it
        block = keys.get("block_size", (list, int))
        found = cls(
            keys.choice("dtype", _DTYPES),
            keys.choice(
                "qscheme",
                ("per_tensor", "per_channel", "per_group", "per_block", "per_token"),
                "per_tensor",
            ),
            keys.get("group_size", int),
            (block, block) if isinstance(block, int) else tuple(block) if block else None,
            keys.get("symmetric", bool, True),
            keys.get("is_dynamic", bool, False),
            keys.get("scale_format", str, "float32"),
        )
        keys.done()
        return found


def fp8(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    qtype = weights.FP8_QTYPES[expect(module, stored, "weight", tuple(weights.FP8_QTYPES)).qtype]
    expect(module, stored, "weight", tuple(weights.FP8_QTYPES), shape)
    block = config.block_size
    pair = (block[-2], block[-1]) if block else None
    group = weights.scale_group(expect(module, stored, "weight_scale", PLAIN), shape, pair)

    def decode(arrays: Arrays) -> QArray:
        return weights.coded(arrays["weight"], qtype, shape, arrays["weight_scale"], group)

    return Layer(("weight", "weight_scale"), decode)


def in_bytes(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    """int8 (or uint8) as it is; a zero point of 0 is left out."""
    signed = config.dtype == "int8"
    expect(module, stored, "weight", "i8" if signed else "u8", shape)
    group = (1, config.group_size) if config.qscheme == "per_group" and config.group_size else None
    if group is None:
        group = weights.scale_group(expect(module, stored, "weight_scale", PLAIN), shape)
    else:
        expect(module, stored, "weight_scale", PLAIN, weights.grid(shape, group))
    zeros = present(stored, "weight_zero_point")
    if zeros:
        shapes = (tuple(stored["weight_scale"].shape),)
        expect(module, stored, "weight_zero_point", _ZEROS, *shapes)
    reads = ("weight", "weight_scale", *zeros)

    def decode(arrays: Arrays) -> QArray:
        zero = arrays.get("weight_zero_point")
        if signed:
            zero = weights.zero_points(zero, shape, group)
        elif zero is not None:
            zero = weights.scales(zero, shape, group)
        qtype = "int8" if signed else "uint8"
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], qtype, shape, scale, group, zero_point=zero)

    return Layer(reads, decode)


def present(stored: Stored, *suffixes: str) -> tuple[str, ...]:
    return tuple(suffix for suffix in suffixes if suffix in stored)


def integers(
    module: str, stored: Stored, shape: Shape, config: TensorConfig, order: Order
) -> Layer:
    """2 to 4 bits in groups (the whole weight is stored transposed) or for each output."""
    bits = int(config.dtype[-1])
    signed = config.dtype.startswith("int")
    *lead, n, k = shape
    grouped = config.qscheme == "per_group"
    size = (config.group_size or k) if grouped else k
    size = k if size == -1 else size
    count = -(-k // size)
    unpack = _unpacker(config.dtype, (*lead, k, n) if grouped else (*lead, n, k), order)
    expect(module, stored, "weight", unpack.dtypes, unpack.stored)
    if grouped:
        scale_shapes: list[Shape] = [(*lead, count, n)]
    else:
        scale_shapes = [(*lead, n), (*lead, n, 1), tuple(lead), (*lead, 1)]
    expect(module, stored, "weight_scale", PLAIN, *scale_shapes)
    single = not grouped and tuple(stored["weight_scale"].shape[len(lead) :]) in ((), (1,))
    group = (n, k) if single else (1, size)
    zero_shape = (*lead, count, n)
    zero_unpack = _unpacker(config.dtype, zero_shape, order)
    along_n = _unpacker(config.dtype, (*lead, n), order)
    if not config.symmetric:
        expect(module, stored, "weight_zero_point")
    zeros = present(stored, "weight_zero_point")
    if zeros and grouped:
        shapes = (zero_unpack.stored, zero_shape)
        expect(module, stored, "weight_zero_point", (*zero_unpack.dtypes, *_ZEROS), *shapes)
    elif zeros:
        shapes = (*scale_shapes, *(() if single else (along_n.stored,)))
        dtypes = (*_ZEROS, *along_n.dtypes)
        expect(module, stored, "weight_zero_point", dtypes, *shapes)

    def rows_first(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(array, -1, -2)) if grouped else array

    def decode(arrays: Arrays) -> QArray:
        half = 1 << (bits - 1)

        def values(*index: slice) -> np.ndarray:
            *before, rows, columns = index
            across, along = (columns, rows) if grouped else (rows, columns)
            found = unpack.some(arrays["weight"], (*before, across), along)
            # Two's complement as offset binary; zero points move along.
            return rows_first(found ^ np.uint8(half) if signed else found)

        unit = {"rows" if grouped else "columns": 8}  # of codes in a word, or in whole bytes
        packed_codes = weights.repacked(shape, bits, values, **unit)
        scale = arrays["weight_scale"]
        scale = LazyArray.of(np.swapaxes(scale, -1, -2)) if grouped else scale
        zero = None
        if zeros:
            raw = arrays["weight_zero_point"]
            if grouped:
                packed = raw.shape != zero_shape
                zero = rows_first(zero_unpack(raw) if packed else raw)
            else:
                packed = not single and raw.shape == along_n.stored != (*lead, n)
                zero = (along_n(raw) if packed else raw).reshape(*lead, -1, 1)
        if signed and zero is not None:
            as_int = zero.astype(np.int32)
            as_int = np.where(as_int >= half, as_int - (1 << bits), as_int)
            zero = None if not as_int.any() else as_int + half
        qtype = f"uint{bits}" if zero is not None or not signed else f"uint{bits}b{half}"
        if zero is None and not signed:
            zero = np.zeros(weights.grid(shape, group), np.uint8)
        if zero is not None:
            zero = weights.scales(zero, shape, group)
            zero = zero.astype(np.uint8) if np.issubdtype(zero.dtype, np.integer) else zero
        return weights.coded(packed_codes, qtype, shape, scale, group, zero_point=zero)

    return Layer(("weight", "weight_scale", *zeros), decode)


@dataclass(frozen=True)
class _Unpacker:
    """Codes uint8 of a shape from what is stored; called with the stored array.

    Attributes:
      eight: stored elements that eight codes take.
    """

    dtypes: tuple[str, ...]
    stored: Shape
    eight: int
    run: Callable[..., np.ndarray]
    count: int

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return self.run(array, count=self.count)

    def some(self, array: np.ndarray, before: tuple[slice, ...], along: slice) -> np.ndarray:
        """The codes `along` the last axis, from a multiple of eight on, of some rows."""
        here = slice(along.start * self.eight // 8, -(-along.stop * self.eight // 8))
        return self.run(np.asarray(array[(*before, here)]), count=along.stop - along.start)


def _unpacker(dtype: str, shape: Shape, order: Order) -> _Unpacker:
    *rest, last = shape
    if dtype in ("int4", "uint4"):
        words = (*rest, -(-last // 8))
        return _Unpacker(("i32", "u32"), words, 1, partial(_words, order=order), last)
    if dtype == "int3":
        return _Unpacker(("u8",), (*rest, -(-last * 3 // 8)), 3, _three, last)
    if dtype == "uint2":
        return _Unpacker(("u8",), (*rest, -(-last // 4)), 2, _high_first, last)
    return _Unpacker(("i8",), tuple(shape), 8, _two, last)


def _three(array: np.ndarray, count: int) -> np.ndarray:
    return codes.unpack(array, 3, count, np)


def _two(array: np.ndarray, count: int) -> np.ndarray:
    return array[..., :count].view(np.uint8) & np.uint8(3)


def _words(array: np.ndarray, count: int, order: Order) -> np.ndarray:
    """Eight 4-bit values a word, value i in nibble order[i]."""
    words = np.ascontiguousarray(array).view(np.uint32)[..., None]
    shifts = np.array(order, np.uint32) * np.uint32(4)
    values = ((words >> shifts) & np.uint32(15)).astype(np.uint8)
    return values.reshape(*array.shape[:-1], -1)[..., :count]


def _high_first(array: np.ndarray, count: int) -> np.ndarray:
    """Four 2-bit values a byte, the first in the highest bits."""
    values = (array[..., None] >> np.array([6, 4, 2, 0], np.uint8)) & np.uint8(3)
    return values.reshape(*array.shape[:-1], -1)[..., :count]


def mx(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    if config.dtype not in _MX_TYPES:
        raise UnsupportedError(f"{module}: {config.dtype} with e8m0 scales is not supported")
    qtype = _MX_TYPES[config.dtype]
    return weights.mx(module, stored, shape, qtype, config.group_size or 32)


def nvfp4(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    *lead, n, k = shape
    if config.dtype != "fp4":
        raise UnsupportedError(f"{module}: {config.dtype} with quantized scales is not supported")
    size = config.group_size or 16
    weights.require_divisible(stored["weight"], k, size)
    expect(module, stored, "weight", "u8", (*lead, n, k // 2))
    expect(module, stored, "weight_scale", "f8_e4m3", (*lead, n, k // size))
    expect(module, stored, "weight_scale_2", PLAIN, tuple(lead), (*lead, 1))

    def decode(arrays: Arrays) -> QArray:
        aux = {"global_scale": weights.scalar(arrays["weight_scale_2"], tuple(lead))}
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], "fp4_e2m1", shape, scale, (1, size), aux=aux)

    return Layer(("weight", "weight_scale", "weight_scale_2"), decode)


def int4_of_fp8(
    module: str, stored: Stored, shape: Shape, config: TensorConfig, order: Order
) -> Layer:
    """Integers of a weight that was scaled to 8-bit floats first: both scales multiply.

    Args:
      config: of the integers, whose tensors have names that end in "_2".
    """
    lead = shape[:-2]
    expect(module, stored, "weight_scale", PLAIN, tuple(lead), (*lead, 1))
    names = {"weight": "weight"} | {
        suffix: f"{suffix}_2"
        for suffix in ("weight_scale", "weight_zero_point")
        if f"{suffix}_2" in stored
    }
    renamed = {suffix: stored[name] for suffix, name in names.items()}
    inner = integers(module, renamed, shape, config, order)

    def decode(arrays: Arrays) -> QArray:
        weight = inner.decode({suffix: arrays[names[suffix]] for suffix in inner.reads})
        whole = {"global_scale": weights.scalar(arrays["weight_scale"], tuple(lead))}
        return replace(weight, aux=weight.aux | whole)

    return Layer((*(names[suffix] for suffix in inner.reads), "weight_scale"), decode)


def encode(
    module: str, weight: QArray, config: TensorConfig, order: Order
) -> dict[str, np.ndarray]:
    """The tensors of a weight, without those of its inputs.

    Raises:
      UnsupportedError: the configuration means another kind of weight.
    """
    n, k = weight.shape
    lead = weight.qvalue.shape[:-2]
    scale, raw, code = np.asarray(weight.scale), np.asarray(weight.qvalue), weight.qtype
    rows = {(n, k): (), (1, k): (n,)}
    sizes = (*lead, *rows.get(weight.group or (1, 1), scale.shape[-2:]))
    grouped = config.qscheme == "per_group"
    if grouped:
        sizes = scale.shape
    if code in (config.dtype, "int8", "uint8") and config.dtype in ("int8", "uint8"):
        zero = np.zeros(sizes, config.dtype) if weight.zero_point is None else weight.zero_point
        return {
            "weight": raw.view(config.dtype),
            "weight_scale": scale.reshape(sizes),
            "weight_zero_point": np.asarray(zero).reshape(sizes).astype(config.dtype),
        }
    if config.dtype in _SMALL and codes.CODES[code].kind == "uint" and not weight.aux:
        return _small_integers(weight, config, order)
    if _MX_TYPES.get(config.dtype, config.dtype) == code:
        values = raw.view(weights.FP8_DTYPES[code]) if code in weights.FP8_DTYPES else raw
        tensors = {"weight": values, "weight_scale": scale.reshape(sizes)}
        if scale.dtype == ml_dtypes.float8_e8m0fnu:
            tensors["weight_scale"] = scale.view(np.uint8)
        if "global_scale" in weight.aux:
            tensors["weight_scale_2"] = np.asarray(weight.aux["global_scale"]).reshape(lead)
        return tensors
    raise UnsupportedError(f"{module}: Quark's {config.dtype} has no layout for {code} weights")


def _small_integers(weight: QArray, config: TensorConfig, order: Order) -> dict[str, np.ndarray]:
    n, k = weight.shape
    lead = weight.qvalue.shape[:-2]
    bits = int(config.dtype[-1])
    # Offset binary as two's complement.
    flip = np.uint8(1 << (bits - 1)) if config.dtype.startswith("int") else np.uint8(0)
    values = codes.unpack(np.asarray(weight.qvalue), bits, k, np) ^ flip
    scale = np.asarray(weight.scale)
    zero = weight.zero_point
    zero = np.full(scale.shape, flip) if zero is None else np.asarray(zero)
    if np.issubdtype(zero.dtype, np.integer):
        zero = zero.astype(np.uint8) ^ flip
    if config.qscheme == "per_group":
        values, scale, zero = (np.swapaxes(a, -1, -2) for a in (values, scale, zero))
    elif weight.group == (n, k):
        scale, zero = scale.reshape(lead), zero.reshape(lead)
    else:
        scale, zero = scale.reshape(*lead, n), zero.reshape(*lead, n)
    packed = zero.ndim > len(lead) and np.issubdtype(zero.dtype, np.integer)
    if packed:
        zero = _pack(zero, config.dtype, order)
    elif zero.dtype == np.uint8:
        zero = ((zero ^ flip).astype(np.int32) - int(flip)).astype(np.int8 if flip else np.uint8)
    return {
        "weight": _pack(values, config.dtype, order),
        "weight_scale": np.ascontiguousarray(scale),
        "weight_zero_point": zero,
    }


def _pack(values: np.ndarray, dtype: str, order: Order) -> np.ndarray:
    """Codes uint8 [..., count] as `_unpacker` reads them."""
    missing = -values.shape[-1] % {"int4": 8, "uint4": 8, "uint2": 4}.get(dtype, 1)
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    if dtype in ("int4", "uint4"):
        eights = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
        shifted = eights << (np.array(order, np.uint32) * np.uint32(4))
        return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)
    if dtype == "int3":
        return codes.pack(np.ascontiguousarray(values), 3)
    if dtype == "uint2":
        fours = values.reshape(*values.shape[:-1], -1, 4) << np.array([6, 4, 2, 0], np.uint8)
        return np.bitwise_or.reduce(fours, axis=-1)
    return ((values ^ np.uint8(2)).astype(np.int8) - np.int8(2)).astype(np.int8)
